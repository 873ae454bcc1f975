"use strict";
try {
  const kept = localStorage.getItem("bench-dfusion-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch { /* no storage: the system's theme */ }
