"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // Elements are made of text, never of markup: what records say stays text.
  function build(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes || {})) if (value !== null && value !== false) element.setAttribute(key, value);
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

  // Numbers as every table of the project writes them.
  const signed = (x) => (x === null || x === undefined ? "–" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(3));
  const plain = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits).replace("-", "−"));
  const count = (x) => (x === null || x === undefined ? "–" : Math.round(x).toLocaleString("en-US"));
  const tickText = (x) => (Math.abs(x) >= 1000 ? count(x) : String(+x.toPrecision(6)).replace("-", "−"));
  const own = (object, key) => (Object.hasOwn(object, key) ? object[key] : null); // a prompt may be "constructor"
  const change = ([base, trained]) => (base === null || trained === null ? null : trained - base);

  // ---- theme
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => {
    theme.textContent = dark() ? "Light theme" : "Dark theme";
  };
  theme.addEventListener("click", () => {
    const next = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("bench-dfusion-theme", next);
    } catch { /* no storage: not remembered */ }
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();

  // ---- the table: sort, filter, open
  const text = new Intl.Collator("en", { numeric: true });
  function compare(a, b, numeric, down) {
    if (a === "" || b === "") return (a === "") - (b === ""); // missing cells stay last either way
    const order = numeric ? (Number(a) > Number(b)) - (Number(a) < Number(b)) : text.compare(a, b);
    return down ? -order : order;
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[1].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = "numeric" in head.dataset;
        const first = numeric && head.dataset.key !== "rank" ? "descending" : "ascending";
        const other = first === "descending" ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const body = table.tBodies[0];
        const key = (row) => row.cells[column].dataset.sort;
        const sorted = [...body.rows].sort((a, b) => compare(key(a), key(b), numeric, order === "descending"));
        body.append(...sorted);
      });
    });
  }

  function filterable(section, table) {
    const form = section.querySelector(".filters");
    const rows = [...table.tBodies[0].rows];
    const nothing = section.querySelector(".nothing");
    const apply = () => {
      const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = ["algorithm", "builder", "reward", "state"].map((key) => [key, form.elements[key].value]);
      const shown = new Set();
      for (const row of rows) {
        const fits = words.every((w) => row.dataset.words.includes(w)) && chosen.every(([key, value]) => !value || row.dataset[key] === value);
        row.hidden = !fits;
        if (fits) shown.add(row.dataset.row);
      }
      form.querySelector("output").textContent = `${shown.size} of ${rows.length} rows`;
      nothing.hidden = shown.size > 0;
      section.shown = shown;
      follow(section);
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(apply));
    nothing.querySelector("button").addEventListener("click", () => form.reset());
    section.shown = new Set(rows.map((row) => row.dataset.row));
  }

  // Charts and pictures follow the table's filter: marks of other rows fade, their pictures go.
  function follow(section) {
    for (const mark of section.querySelectorAll(".plot [data-row]")) mark.classList.toggle("off", !section.shown.has(mark.dataset.row));
    for (const picture of section.querySelectorAll(".pictures [data-row]")) picture.hidden = !section.shown.has(picture.dataset.row);
  }

  // ---- the records behind a row
  const dialog = document.getElementById("dialog");
  const title = document.getElementById("dialog-title");
  const body = dialog.querySelector(".dialog-body");
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // the ground beside it
  dialog.addEventListener("close", () => dialog.open || body.replaceChildren()); // the event comes late: it may be open again

  function show(name, ...content) {
    title.textContent = name;
    body.replaceChildren(...content.flat(Infinity).filter((part) => part !== null));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  const table = (heads, lines, words = 1) =>
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": heads.filter(Boolean).join(", ") },
      h("table", {},
        h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: i < words ? null : "n" }, head)))),
        h("tbody", {}, lines.map((line) => h("tr", {}, line.map((cell, i) => h("td", { class: i < words ? "words" : "n" }, cell)))))));
  const facts = (pairs) => h("dl", {}, pairs.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  const written = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const flat = (value, prefix = "") =>
    Object.entries(value).flatMap(([key, inner]) =>
      inner !== null && typeof inner === "object" && !Array.isArray(inner) ? flat(inner, `${prefix}${key}.`) : [[prefix + key, written(inner)]]);
  // Long tables are made when they are opened.
  function folded(name, make) {
    const whole = h("details", {}, h("summary", {}, name));
    whole.addEventListener("toggle", () => whole.open && whole.children.length === 1 && whole.append(...[make()].flat()));
    return whole;
  }

  function promptTable(track, verdicts) {
    const prompts = verdicts[0].scores.map((_, i) => track.prompts[i] ?? `prompt ${i + 1}`);
    const heads = ["prompt", ...track.judges.flatMap((j) => [`${j.name} base`, "trained", "gain"])];
    return table(heads, prompts.map((prompt, i) => [
      [prompt, own(track.templates, prompt) === null ? null : h("small", {}, own(track.templates, prompt))],
      ...verdicts.flatMap((v) => [plain(v.scores[i][0]), plain(v.scores[i][1]), signed(change(v.scores[i]))]),
    ]));
  }
  function templateTable(track, verdicts) {
    const names = Object.keys(verdicts[0].templates);
    const heads = ["template", ...track.judges.flatMap((j) => [`${j.name} base`, "trained", "gain"])];
    return table(heads, names.map((name) => [name, ...verdicts.flatMap((v) => {
      const both = own(v.templates, name) || [null, null];
      return [plain(both[0]), plain(both[1]), signed(change(both))];
    })]));
  }
  // The mean over the finished runs of a row, in the shape of one run's verdicts.
  function meanVerdicts(runs) {
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    const both = (pick) => [0, 1].map((side) => mean(runs.map((run) => pick(run)[side])));
    return runs[0].verdicts.map((verdict, n) => ({
      templates: Object.fromEntries(Object.keys(verdict.templates).map((t) => [t, both((run) => own(run.verdicts[n].templates, t) || [NaN, NaN])])),
      scores: verdict.scores.map((_, i) => both((run) => run.verdicts[n].scores[i])),
    }));
  }

  function runDetails(track, row, run) {
    const parts = [];
    if (run.evidence) parts.push(h("h4", {}, "Why it failed"), h("pre", { class: "wrong" }, run.evidence));
    if (run.verdicts.length) {
      parts.push(h("h4", {}, "Verdicts"), table(["judge", "base", "trained", "gain", "95 %", "interval", ""], run.verdicts.map((v, n) => [
        [track.judges[n].name, h("small", {}, track.judges[n].metric)],
        plain(v.base), plain(v.trained), signed(v.gain[0]), `${signed(v.gain[1])} to ${signed(v.gain[2])}`, v.kind, v.trained_on ? "trained on it" : "",
      ])));
      if (Object.keys(run.verdicts[0].templates).length) parts.push(h("h4", {}, "By template"), templateTable(track, run.verdicts));
    }
    const c = run.cost, d = run.drift;
    parts.push(h("h4", {}, "Cost and drift"), facts([
      ["reward queries", c.reward_queries ? count(c.reward_queries) : "offline: none"],
      ["network evaluations", count(c.network_evaluations)],
      ["updates", count(c.updates)],
      ["wall time", `${count(Object.values(c.seconds).reduce((a, b) => a + (b || 0), 0))} s: ${Object.entries(c.seconds).map(([k, v]) => `${k} ${count(v)}`).join(", ")}`],
      ["peak memory", `${count(c.peak_memory_mb)} MB on ${c.device}`],
      ["training reward rise", signed(run.rise)],
      ...(d ? [
        ["KL to the base", `${plain(d.kl, 5)} nats`],
        ["distance to the base", `${plain(d.pixels, 2)} levels`],
        ["diversity", `${plain(d.diversity_base, 3)} → ${plain(d.diversity_trained, 3)} effective images (${d.diversity_space})`],
      ] : []),
    ]));
    parts.push(folded("Rounds", () => table(["round", "queries", "reward", "sd", "bases", "winners", "pairs", "dropped"],
      run.rounds.map((r) => [r[0], count(r[1]), ...r.slice(2, 6).map((x) => plain(x)), count(r[6]), count(r[7])]), 0)));
    if (run.verdicts.length) parts.push(folded(`Scores of ${run.verdicts[0].scores.length} held-out prompts`, () => promptTable(track, run.verdicts)));
    parts.push(folded("As it was given, and provenance", () => [facts(flat(run.given)), facts([["batch", written(run.batch)], ["cell", run.cell], ...flat(run.provenance)])]));
    parts.push(h("p", { class: "fine" }, run.path || "no file: this record was given by Python"));
    const gain = run.verdicts.length ? h("span", {}, `${track.judges[0].name} ${signed(run.verdicts[0].gain[0])}`) : null;
    return h("details", { class: "run", "data-seed": run.seed, open: row.runs.length + row.unfinished.length === 1 || run.status === "failed" ? "" : null },
      h("summary", {}, `Seed ${run.seed}`, run.status === "failed" ? h("b", { class: "badge failed" }, "failed") : gain), parts);
  }

  const unfinishedDetails = (cell) =>
    h("details", { class: "run", "data-seed": cell.seed, open: "" },
      h("summary", {}, `Seed ${cell.seed}`, h("b", { class: "badge incomplete" }, "no record")),
      cell.error ? h("pre", { class: "wrong" }, cell.error) : h("p", { class: "fine" }, "Registered, not finished, and no error was left."),
      h("p", { class: "fine" }, cell.path));

  function openRow(section, number) {
    const track = DATA.tracks[section.dataset.track];
    const row = track.rows[number];
    const done = row.runs.filter((run) => run.status === "finished");
    const [algorithm, builder, reward] = row.name;
    const tr = section.querySelector(`.board tr[data-row="${number}"]`);
    const content = [];
    const about = [row.state === "ranked" ? `rank ${tr.cells[0].textContent.trim()}` : null, row.note || null, row.variant || null].filter(Boolean);
    content.push(h("p", { class: "meta" }, about.join(" · ") || row.state));
    if (done.length) {
      const means = meanVerdicts(done);
      const over = `${done.length === 1 ? "one run" : `${done.length} runs`}${row.state === "miss" ? " that finished; the miss makes the gain −∞" : ""}`;
      const columns = [...section.querySelectorAll(".board thead tr:last-child th")];
      content.push(h("h3", {}, `Mean of ${over}`), table(["judge", "gain", "95 %", "base", "trained"], track.judges.map((judge, n) => {
        const cell = tr.cells[columns.findIndex((c) => c.dataset.key === `${n} gain`)];
        const mean = (key) => done.reduce((sum, run) => sum + run.verdicts[n][key], 0) / done.length;
        return [[judge.name, h("small", {}, judge.metric)], cell.querySelector(".value").textContent, cell.querySelector("small")?.textContent || "–", plain(mean("base")), plain(mean("trained"))];
      })));
      if (done.length > 1) {
        if (Object.keys(means[0].templates).length) content.push(folded(`By template, mean of ${done.length} runs`, () => templateTable(track, means)));
        content.push(folded(`By prompt, mean of ${done.length} runs`, () => promptTable(track, means)));
      }
    }
    content.push(h("h3", {}, "Runs"));
    const cells = [
      ...row.runs.map((run) => [run.seed, runDetails(track, row, run)]),
      ...row.unfinished.map((cell) => [cell.seed, unfinishedDetails(cell)]),
    ];
    content.push(...cells.sort(([a], [b]) => a - b).map(([, part]) => part));
    content.push(h("h3", {}, "Options, the same for every seed"), facts(flat(row.options)));
    if (row.tuning) content.push(h("p", { class: "fine" }, `Tuning: ${row.tuning}`));
    const pictures = [...section.querySelectorAll(`.pictures figure[data-row="${number}"] img`)];
    if (pictures.length) content.push(h("h3", {}, "Pictures"), pictures.map((img) => h("img", { src: img.src, alt: img.alt })));
    show(`${algorithm} on ${builder} samples, reward ${reward}`, content);
  }

  // ---- charts
  function ticks(low, high, most) {
    const span = high - low, power = 10 ** Math.floor(Math.log10(span / most));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((each) => span / each <= most);
    const result = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) result.push(+(i * step).toPrecision(12));
    return result;
  }
  function span(values, withZero) {
    const all = withZero ? [0, ...values] : values;
    const low = Math.min(...all), high = Math.max(...all), pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low === 0 ? 0 : low - pad, high + pad];
  }

  // Axes and a grid; returns the picture and where values lie in it.
  function frame({ width, height, x, y, xName, yName, heading, label }) {
    const box = { left: 52, right: width - 24, top: heading ? 28 : 12, bottom: height - 40 };
    const X = (v) => box.left + ((v - x[0]) / (x[1] - x[0])) * (box.right - box.left);
    const Y = (v) => box.bottom - ((v - y[0]) / (y[1] - y[0])) * (box.bottom - box.top);
    const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, s("title", {}, label));
    for (const v of ticks(...y, Math.max(3, Math.floor((box.bottom - box.top) / 44)))) {
      picture.append(s("line", { class: v === 0 ? "zero" : "grid", x1: box.left, x2: box.right, y1: Y(v), y2: Y(v) }),
        s("text", { x: box.left - 8, y: Y(v) + 4, "text-anchor": "end" }, tickText(v)));
    }
    for (const v of ticks(...x, Math.max(3, Math.floor((box.right - box.left) / 90)))) {
      picture.append(s("line", { class: v === 0 && x[0] < 0 ? "zero" : "grid", x1: X(v), x2: X(v), y1: box.top, y2: box.bottom }),
        s("text", { x: X(v), y: box.bottom + 16, "text-anchor": "middle" }, tickText(v)));
    }
    picture.append(s("text", { x: box.right, y: height - 6, "text-anchor": "end" }, xName));
    if (heading) picture.append(s("text", { class: "title", x: box.left, y: 14 }, heading));
    if (yName) picture.append(s("text", { x: box.left + 4, y: box.top + 12, class: "name" }, yName));
    return { picture, box, X, Y };
  }
  const point = (x, y, mark, hollow, row, name) =>
    s("g", { class: `point k${mark}${hollow ? " hollow" : ""}`, "data-row": row }, s("title", {}, name), s("circle", { cx: x, cy: y, r: 13, fill: "transparent" }),
      s("use", { href: `#m${mark}`, x: x - 8, y: y - 8, width: 16, height: 16 }));
  const empty = (plot, words) => plot.replaceChildren(h("p", { class: "none" }, words));
  const rowName = (row) => `${row.name.join(", ")}${row.variant ? ` (${row.variant})` : ""}`;

  const ruler = document.createElement("canvas").getContext("2d");
  const widthOf = (words) => ((ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`), ruler.measureText(words).width);
  const clash = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  function drawCost(section, plot, width) {
    const track = DATA.tracks[section.dataset.track];
    const select = plot.parentElement.querySelector("select");
    const cost = select.value;
    const found = track.rows.map((row, number) => ({ row, number, cost: row.costs[cost], gain: row.gain })).filter((p) => p.cost !== null && p.gain[0] !== null);
    if (!found.length) return empty(plot, "No row has both a gain and this cost.");
    const costs = found.map((p) => p.cost);
    const { picture, box, X, Y } = frame({
      width, height: Math.min(460, Math.max(320, width * 0.5)), x: span(costs, cost === "kl"), y: span(found.flatMap((p) => p.gain), true),
      xName: select.selectedOptions[0].textContent + (cost === "kl" ? " (nats)" : ", a run"), yName: `${track.judges[0].name} gain`,
      label: `Gain before ${track.judges[0].name} against ${select.selectedOptions[0].textContent}, ${found.length} rows`,
    });
    // Rows of one cost stand side by side.
    for (const p of found) {
      const beside = found.filter((other) => other.cost === p.cost);
      p.x = X(p.cost) + (beside.indexOf(p) - (beside.length - 1) / 2) * Math.min(22, (width - 140) / beside.length);
    }
    const front = track.fronts[cost].map((number) => found.find((p) => p.number === number)).filter(Boolean);
    if (front.length) {
      const steps = front.map((p, i) => (i ? `H${p.x}V${Y(p.gain[0])}` : `M${p.x} ${Y(p.gain[0])}`)).join("");
      picture.append(s("path", { class: "front", d: `${steps}H${box.right}` }));
    }
    // A name stands clear of marks and other names, and where it can of the whiskers too.
    const taken = found.map((p) => [p.x - 8, Y(p.gain[0]) - 8, p.x + 8, Y(p.gain[0]) + 8]);
    taken.push([box.left, box.top, box.left + 90, box.top + 18]);
    const whiskers = found.map((p) => [p.x - 1, Y(p.gain[2]), p.x + 1, Y(p.gain[1])]);
    const rewards = new Set(found.map((p) => p.row.name[2]));
    const names = s("g", {});
    for (const p of found) {
      const mark = point(p.x, Y(p.gain[0]), p.row.mark, p.row.state !== "ranked", p.number,
        `${rowName(p.row)}: ${signed(p.gain[0])} [${signed(p.gain[1])}, ${signed(p.gain[2])}], ${select.selectedOptions[0].textContent} ${tickText(p.cost)}${p.row.note ? `; ${p.row.note}` : ""}`);
      mark.insertBefore(s("line", { class: "whisker", x1: p.x, x2: p.x, y1: Y(p.gain[1]), y2: Y(p.gain[2]) }), mark.lastChild);
      picture.append(mark);
      let words = p.row.name[0] + (rewards.size > 1 ? `, ${p.row.name[2]}` : "");
      if (words.length > 26) words = `${words.slice(0, 25)}…`;
      const wide = widthOf(words), y = Y(p.gain[0]);
      const places = [[10, 4, "start"], [-10, 4, "end"], [10, -8, "start"], [-10, -8, "end"], [10, 16, "start"], [-10, 16, "end"]];
      const free = places.map(([dx, dy, anchor]) => {
        const left = anchor === "start" ? p.x + dx : p.x + dx - wide;
        return { dx, dy, anchor, area: [left, y + dy - 11, left + wide, y + dy + 3] };
      }).filter(({ area }) => area[0] > box.left + 2 && area[2] < width && !taken.some((t) => clash(area, t)));
      const place = free.find(({ area }) => !whiskers.some((t) => clash(area, t))) || free[0];
      if (place) {
        taken.push(place.area);
        names.append(s("text", { class: "name", x: p.x + place.dx, y: y + place.dy, "text-anchor": place.anchor, "data-row": p.number }, words));
      }
    }
    picture.append(names);
    plot.replaceChildren(picture);
  }

  // The width of each of `n` panels in rows as equal as they can be.
  function panelWidth(plot, least, n) {
    const gap = 20, most = Math.max(1, Math.floor((plot.clientWidth + gap) / (least + gap)));
    const columns = Math.ceil(n / Math.ceil(n / most));
    plot.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    return (plot.clientWidth - gap * (columns - 1)) / columns;
  }

  function drawCurves(section, plot) {
    const track = DATA.tracks[section.dataset.track];
    const rows = track.rows.map((row, number) => ({ ...row, number })).filter((row) => row.curve.band.length > 1 || row.curve.collapsed.length);
    if (!rows.length) return empty(plot, "No run has drawn samples in two rounds, so there is no curve.");
    const panels = new Map();
    for (const row of rows) {
      const key = JSON.stringify([row.name[2], row.name[0]]);
      panels.set(key, [...(panels.get(key) || []), row]);
    }
    const width = panelWidth(plot, 300, panels.size);
    const pictures = [...panels].sort(([a], [b]) => text.compare(a, b)).map(([key, own]) => {
      const [reward, algorithm] = JSON.parse(key);
      const alike = rows.filter((row) => row.name[2] === reward);
      const points = alike.flatMap((row) => [...row.curve.band.map((p) => [p[0], p[2], p[3]]), ...row.curve.collapsed.flat().map((p) => [p[0], p[1], p[1]])]);
      const { picture, X, Y } = frame({
        width, height: 200, x: [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0])) + 1e-9], y: span(points.flatMap((p) => [p[1], p[2]]), true),
        xName: "reward queries", heading: `${algorithm}, ${reward}`, label: `Rise of the training reward ${reward} over queries, ${algorithm}: ${own.map((row) => row.name[1]).join(", ")}`,
      });
      for (const row of own) {
        const group = s("g", { class: `k${row.mark} point`, "data-row": row.number }, s("title", {}, `${rowName(row)}: ${row.curve.runs} runs${row.curve.collapsed.length ? `, ${row.curve.collapsed.length} collapsed` : ""}`));
        const band = row.curve.band;
        if (band.length > 1) {
          const line = (column) => band.map((p) => `${X(p[0]).toFixed(1)} ${Y(p[column]).toFixed(1)}`);
          group.append(s("path", { class: "band", d: `M${line(2).join("L")}L${line(3).reverse().join("L")}Z` }), s("path", { class: "curve", d: `M${line(1).join("L")}` }));
          const last = band.at(-1);
          group.append(s("use", { href: `#m${row.mark}`, x: X(last[0]) - 7, y: Y(last[1]) - 7, width: 14, height: 14 }));
        }
        for (const run of row.curve.collapsed) {
          const [x, y] = [X(run.at(-1)[0]), Y(run.at(-1)[1])];
          group.append(s("path", { class: "collapsed", d: `M${run.map((p) => `${X(p[0])} ${Y(p[1])}`).join("L")}` }),
            s("path", { class: "curve", d: `M${x - 4} ${y - 4}l8 8m-8 0l8-8` }));
        }
        picture.append(group);
      }
      return picture;
    });
    plot.replaceChildren(...pictures);
  }

  function drawRise(section, plot) {
    const track = DATA.tracks[section.dataset.track];
    const runs = track.rows.flatMap((row, number) => row.runs.filter((run) => run.rise !== null && run.verdicts.length).map((run) => ({ row, number, run, x: run.rise, y: run.verdicts[0].gain[0] })));
    if (!runs.length) return empty(plot, "No finished run has drawn samples, so no rise of the training reward is known.");
    const y = span(runs.map((p) => p.y), true);
    y[0] -= 0.12 * (y[1] - y[0]); // room for the words in the corner
    const rewards = [...new Set(runs.map((p) => p.row.name[2]))].sort(text.compare);
    const width = panelWidth(plot, 420, rewards.length);
    plot.replaceChildren(...rewards.map((reward) => {
      const own = runs.filter((p) => p.row.name[2] === reward);
      const { picture, box, X, Y } = frame({
        width, height: 320, x: span(own.map((p) => p.x), true), y, xName: `rise of ${reward}, the training reward`, yName: `${track.judges[0].name} gain`, heading: `reward ${reward}`,
        label: `Rise of the training reward ${reward} against the gain before ${track.judges[0].name}, ${own.length} runs`,
      });
      picture.append(s("text", { x: box.right - 6, y: box.bottom - 8, "text-anchor": "end" }, "over-optimised ↘"));
      for (const p of own) {
        picture.append(point(X(p.x), Y(p.y), p.row.mark, p.run.verdicts[0].trained_on, p.number,
          `${rowName(p.row)}, seed ${p.run.seed}: rise ${signed(p.x)}, gain ${signed(p.y)}`));
      }
      return picture;
    }));
  }

  // The gain at each rung of the ladder, a panel for each algorithm and reward.
  function drawClimb(section, plot) {
    const track = DATA.tracks[section.dataset.track];
    const rows = [...track.rows.map((row, number) => ({ ...row, number })), ...track.early].filter((row) => row.climb.length);
    if (!rows.length) return empty(plot, "No row has been judged at a rung.");
    const panels = new Map();
    for (const row of rows) {
      const key = JSON.stringify([row.name[2], row.name[0]]);
      panels.set(key, [...(panels.get(key) || []), row]);
    }
    const points = rows.flatMap((row) => row.climb);
    const x = [0, Math.max(...points.map((p) => p[0])) * 1.06];
    const y = span(points.flatMap((p) => p.slice(1)).filter((v) => v !== null), true);
    const width = panelWidth(plot, 300, panels.size);
    const pictures = [...panels].sort(([a], [b]) => text.compare(a, b)).map(([key, own]) => {
      const [reward, algorithm] = JSON.parse(key);
      const { picture, box, X, Y } = frame({
        width, height: 200, x, y, xName: "reward queries", heading: `${algorithm}, ${reward}`,
        label: `Gain before ${track.judges[0].name} at each rung, ${algorithm} with ${reward}: ${own.map((row) => row.name[1]).join(", ")}`,
      });
      own.forEach((row, i) => {
        const shift = (i - (own.length - 1) / 2) * 5; // intervals of one budget stand side by side
        const at = (p) => X(p[0]) + shift;
        const judged = row.climb.filter((p) => p[1] !== null), fallen = row.climb.find((p) => p[1] === null);
        const told = row.climb.map((p) => `${p[0]} queries ${p[1] === null ? "−∞" : `${signed(p[1])} [${signed(p[2])}, ${signed(p[3])}]`}`);
        const group = s("g", { class: `k${row.mark} point${row.state === "ranked" ? "" : " hollow"}`, ...(row.number === undefined ? {} : { "data-row": row.number }) }, s("title", {}, `${rowName(row)}: ${told.join("; ")}`));
        if (judged.length) group.append(s("path", { class: "curve", d: `M${judged.map((p) => `${at(p)} ${Y(p[1])}`).join("L")}` }));
        for (const p of judged) {
          group.append(s("line", { class: "whisker", x1: at(p), x2: at(p), y1: Y(p[2]), y2: Y(p[3]) }),
            s("use", { href: `#m${row.mark}`, x: at(p) - 7, y: Y(p[1]) - 7, width: 14, height: 14 }));
        }
        if (fallen) {
          const last = judged.at(-1), foot = box.bottom - 5;
          if (last) group.append(s("path", { class: "collapsed", d: `M${at(last)} ${Y(last[1])}L${at(fallen)} ${foot}` }));
          group.append(s("path", { class: "curve", d: `M${at(fallen) - 4} ${foot - 4}l8 8m-8 0l8-8` }));
        }
        picture.append(group);
      });
      return picture;
    });
    plot.replaceChildren(...pictures);
  }

  const DRAW = { cost: drawCost, climb: drawClimb, curves: drawCurves, rise: drawRise };
  for (const section of document.querySelectorAll("section.track")) {
    const board = section.querySelector(".board");
    sortable(board);
    filterable(section, board);
    board.tBodies[0].addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      // Selecting text in a row is no click on it.
      if (row && (event.target.closest(".open") || !String(getSelection()))) openRow(section, Number(row.dataset.row));
    });
    for (const chart of section.querySelectorAll("[data-chart]")) {
      const plot = chart.querySelector(".plot");
      let drawn = 0;
      const draw = () => {
        drawn = plot.clientWidth;
        if (!drawn) return;
        DRAW[chart.dataset.chart](section, plot, drawn);
        follow(section);
      };
      new ResizeObserver(() => Math.abs(plot.clientWidth - drawn) > 1 && requestAnimationFrame(draw)).observe(plot);
      chart.querySelector("select")?.addEventListener("change", draw);
      plot.addEventListener("click", (event) => {
        const mark = event.target.closest("[data-row]");
        if (mark) openRow(section, Number(mark.dataset.row));
      });
      draw();
    }
    for (const zoom of section.querySelectorAll(".zoom")) {
      const img = zoom.querySelector("img");
      zoom.addEventListener("click", () => show(zoom.parentElement.querySelector("b").textContent, h("img", { src: img.src, alt: img.alt })));
    }
  }
})();
