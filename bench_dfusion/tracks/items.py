"""The things a prompt names, and the text tokens that name them: the columns the fusion mask is made of.

The paper's authors wrote items and token positions by hand for every prompt (D-Fusion, Hu et al. 2025); here
both are found by rule, in English, with closed word lists and no model.

The rule. A noun phrase is a run of adjectives and nouns; a determiner, number, preposition, conjunction,
pronoun, auxiliary, verb or punctuation mark ends it. Its last noun is the item, what stands before are
attributes, numbers are neither. In detail:

- An -ing word is a verb once its phrase has a noun ("a dog riding"), else an attribute ("a sleeping cat").
  Words without a vowel before -ing ("ring", "king", "string") and listed ones ("building") are nouns, the
  listed ones verbs between a noun and a determiner ("a man building a house").
- An -ed word, or a listed participle, is a verb after a noun unless a noun follows ("a snow covered hill").
  Other verbs come from a list: "sits" after a noun, "sit" after a plural, an auxiliary or "to".
- "and", "or" and a comma join adjectives ("a black and woolen bus") and separate everything else.
- Phrases of pure adjectives are no items; names of materials ("glass", "gold") may be either.
- What a thing is made of is its attribute ("a building made of brick"); so is an owner ("a dog's bone").
- No items: places in relations ("left of", "on the left side of", "in the background"), measures before
  "of" ("a pair of shoes"), and an opening "a photo of", "an oil painting of" and the like.

Limits. An adjective that no list knows counts as a noun ("a gnarly and old tree": gnarly, tree), which also
turns a following -ing word into a verb. A material joined to a noun reads as its adjective ("a glass and
bottle"). A transitive -ing noun without a determiner after it stays a noun ("a man painting walls"). Times,
styles and artists' names are nouns like others ("at night", "by Monet"), and so is what is absent ("without
a hat") or spelled in quotes. For such prompts give the items by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NUMBERS = _set(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty hundred thousand million dozen dozens hundreds thousands several many few both "
    "various multiple these those"
)
_DETERMINERS = _NUMBERS | _set(
    "a an one this each every another the some any no all half most more less other such same first second third my "
    "your his her its our their whose"
)
_PREPOSITIONS = _set(
    "of in on at to from by with without for about above across after against along alongside amid amidst among "
    "amongst around as atop away before behind below beneath beside besides between beyond despite down during except "
    "far inside into like near nearby next off onto opposite out outside over past per through throughout toward "
    "towards under underneath until unlike up upon versus via vs within aboard adjacent apart together"
)
_CONJUNCTIONS = _set("and or nor & + plus ,")
_BE = _set(
    "is are was were be been being am isn't aren't wasn't weren't it's he's she's that's there's they're has have had "
    "having do does did don't doesn't can could will would shall should may might must seems appears becomes"
)
_PRONOUNS = _set(
    "i you he she it we they me him us them who whom which what that there here where when while why how if because "
    "since though although but so than then not himself herself itself themselves themself yourself someone somebody "
    "something anyone anything everyone everybody everything nothing nobody none mine yours ours theirs"
)
_ADVERBS = _set("very quite rather really too also just only almost even still again once twice ever never always")
_COLOURS = _set(
    "red yellow green cyan blue purple black white brown grey gray pink violet magenta turquoise teal beige maroon "
    "navy crimson scarlet indigo lavender azure khaki tan blond blonde golden silvery colorful colourful multicolored "
    "reddish greenish bluish yellowish brownish blackish whitish greyish grayish pinkish purplish"
)
_MATERIALS = _set(
    "orange gold silver bronze copper brass tin aluminum aluminium steel iron metal glass crystal diamond brick stone "
    "marble granite concrete clay ceramic porcelain wood oak pine bamboo wicker straw paper cardboard plastic rubber "
    "leather fur wool cotton silk satin velvet linen denim lace felt canvas nylon vinyl chrome jade ivory wax ice snow "
    "light"
)
_ADJECTIVES = _COLOURS | _set(
    "wooden woolen woollen metallic earthen silken stony glassy plush knitted big small large little tiny huge giant "
    "gigantic enormous massive mini miniature tall short long wide narrow broad thick thin fat slim slender deep "
    "shallow high low heavy round oval flat sharp pointy pointed curved straight upper lower left right old young new "
    "ancient modern vintage antique retro futuristic rustic medieval cute pretty lovely ugly elegant adorable fancy "
    "plain simple happy sad angry sleepy tired hungry scared funny silly friendly lonely lazy brave calm wild tame "
    "proud shy curious playful smiling grumpy busy crazy scary spooky creepy dark bright pale dull vivid shiny glossy "
    "matte transparent translucent clear cloudy sunny rainy snowy windy stormy foggy misty dusty dirty clean muddy wet "
    "dry hot cold warm cool frozen soft hard rough smooth fluffy furry hairy fuzzy curly wavy spiky bumpy silky woolly "
    "sticky slimy rusty rocky sandy grassy leafy mossy icy fiery smoky hollow solid liquid full empty open closed "
    "broken cracked torn busted fresh ripe rotten raw juicy tasty delicious sweet sour salty spicy cozy cosy comfy "
    "quiet loud noisy fast slow quick tidy messy neat rich poor royal magic holy evil good bad great nice perfect "
    "amazing epic strange weird odd rare unique special common real fake artificial natural digital virtual electric "
    "abstract realistic surreal cinematic detailed intricate ornate chubby skinny muscular strong weak bald elderly "
    "male female pregnant wise fierce mighty noble gentle gothic baroque cubist minimalist minimal japanese chinese "
    "korean indian french italian german spanish english british american african asian european mexican greek roman "
    "egyptian russian dutch victorian persian arctic tropical urban rural alien cosmic floral tribal lush ready barren "
    "remote distant close whole single double"
)
_PARTICIPLES = _set(
    "made built seen worn held shown drawn driven hung lit kept known taken written thrown ridden eaten woven hidden "
    "bound shut stuck spread cast bent wrapped set sewn"
)
_NOUNS_ING = _set(
    "building painting drawing carving engraving rendering ceiling railing paneling flooring awning clothing earring "
    "stocking lining lightning pudding frosting icing topping filling stuffing dressing dumpling herring duckling "
    "gosling starling seedling sapling sibling darling viking wedding meeting morning evening crossing landing opening "
    "parking dwelling bearing casing coating bedding offspring shoestring mooring plumbing lettering halfling "
    "fledgling yearling"
)
_NOUNS_ED = _set("moped seabed biped quadruped flatbed bobsled watershed roadbed sickbed sunbed waterbed newlywed")
_NOUNS_LY = _set(
    "fly family lily jelly belly ally assembly bully rally dolly holly gully lolly billy monopoly anomaly potbelly "
    "italy july reply supply trolly tally emily molly kelly sally"
)
_ADJECTIVES_LY = _set(
    "lovely friendly lonely curly woolly wooly elderly silly ugly hilly smelly bubbly wobbly prickly heavenly deadly "
    "daily lively scaly chilly oily holy early wrinkly"
)
_VERBS = _set(
    "sit stand lie ride eat play hold wear run jump walk sleep fly swim read drive chase carry wash cook climb lean "
    "stare push pull throw catch kick hug kiss sing dance smile wait talk write make give take bring float dive surf "
    "graze hang rest leap sail perch roam wander lick sniff say chew relax kneel crawl hover gaze fall look see get go"
)
_BASES = _VERBS | _set("watch drink ski skate show use work paint draw hit bite fight build open feed pet cut cross")
_THIRD = (
    frozenset(v + ("es" if v.endswith(("s", "sh", "ch", "o")) else "s") for v in _VERBS) | _set("carries flies")
) - {"carrys", "flys"}
_PLURALS = _set("people men women children mice geese sheep deer fish cattle feet teeth")
_MADE = _set("made built constructed crafted carved woven composed formed sculpted molded moulded")
_PICTURES = _set(
    "photo photograph picture image painting drawing sketch illustration portrait rendering render close-up closeup "
    "shot snapshot view depiction watercolor watercolour artwork art cartoon print poster screenshot selfie scene "
    "video film clip frame animation engraving photography"
)
_MEASURES = _set(
    "pair pairs couple lot lots number group groups bunch set sets handful plenty kind kinds type types sort variety "
    "piece pieces collection row rows series mouthful spoonful armful bit"
)
_NEVER = _set("background foreground style left right")
_PLACE = _set(
    "left right top bottom front back rear middle center centre side sides edge corner end background foreground "
    "distance"
)
_PLACE_BEFORE = _set(
    "left right upper lower far near opposite other very left-hand right-hand hand top bottom front back rear"
)

_MARKS = r"\w\u0300-\u036f"  # combining accents belong to their letter, `\w` alone would cut there
_TOKEN = re.compile(rf"[{_MARKS}]+(?:['’-][{_MARKS}]+)*|[^\w\s]")
_HANDY = "items can be given by hand (`items=`), as words of the prompt"


@dataclass(frozen=True)
class Item:
    """A thing a prompt names, as the prompt spells it.

    `spans` are character ranges (start, end) of the prompt, in order: the noun's, or with `attributes=True`
    the noun's and its attributes'.
    """

    noun: str
    attributes: tuple[str, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Word:
    text: str  # lower-cased
    kind: str
    span: Span


@dataclass
class _Phrase:
    determiner: str = ""
    predicate: bool = False  # directly after a form of "be"
    material: bool = False  # after "made of"
    words: list[_Word] = field(default_factory=list)

    @property
    def noun(self) -> bool:
        return any(w.kind in _NOUNS for w in self.words)

    @property
    def named(self) -> bool:
        """Whether the phrase could end here with a noun."""
        return self.noun or (bool(self.words) and self.words[-1].kind == "material")


_NOUNS = ("noun", "noun-ing", "base", "third")
_CONTENT = (*_NOUNS, "adjective", "material", "ing", "participle", "owner")


def find_items(prompt: str, attributes: bool = False) -> list[Item]:
    """The items of a prompt in reading order: heads of its noun phrases, by the module's rule.

    With `attributes` their spans take in the attributes' words. Raises ValueError where nothing is found.
    """
    words = _classify(prompt)
    heads: list[tuple[_Word, list[_Word]]] = []
    opening = True
    for phrase, following in _phrases(words):
        head, others = _head(phrase)
        if head is None:
            continue
        of = following is not None and following.text == "of"
        picture, opening = opening and of and head.text in _PICTURES, False
        if phrase.material and heads:
            heads[-1][1].extend([*others, head])
        elif not (picture or head.text in _NEVER or (of and head.text in _MEASURES)):
            heads.append((head, others))
    if not heads:
        raise ValueError(f"no item found in the prompt {prompt!r}; {_HANDY}")
    return [
        Item(
            prompt[slice(*head.span)],
            tuple(prompt[slice(*w.span)] for w in others),
            tuple(sorted(w.span for w in ([head, *others] if attributes else [head]))),
        )
        for head, others in heads
    ]


def _head(phrase: _Phrase) -> tuple[_Word | None, list[_Word]]:
    """The head noun of a phrase, if it has one, and its attributes."""
    allowed = [*_NOUNS]
    if not phrase.predicate or phrase.determiner:
        allowed.append("material")  # "the floor is marble" names no second thing
    if phrase.determiner:
        allowed.append("ing")  # "a gathering"
    for i in reversed(range(len(phrase.words))):
        if phrase.words[i].kind in allowed:
            return phrase.words[i], phrase.words[:i] + phrase.words[i + 1 :]
        if phrase.words[i].kind not in ("adjective", "participle"):
            break
    return None, []


def _phrases(words: list[_Word]) -> Iterator[tuple[_Phrase, _Word | None]]:
    """The noun phrases of a classified prompt, each with the word that ended it."""
    phrase = _Phrase()
    action = False  # a verb has been seen: a bare -ing word goes on with it
    for i, word in enumerate(words):
        after = words[i + 1].kind if i + 1 < len(words) else "end"
        before = words[i - 1] if i else None
        if word.kind in _CONTENT and not _is_verb(word, phrase, before, after, action):
            phrase.words.append(word)
            continue
        joins = word.kind == "conjunction" and phrase.words and not phrase.noun
        if joins and after in (*_CONTENT, "conjunction"):
            continue
        if phrase.words:
            yield phrase, word
        if word.kind == "determiner":
            phrase = _Phrase(word.text, material=phrase.material and not phrase.words)
        else:
            phrase = _Phrase(predicate=word.kind == "be", material=word.kind == "made")
            action = action or word.kind in ("be", "made", *_CONTENT)
    if phrase.words:
        yield phrase, None


def _is_verb(word: _Word, phrase: _Phrase, before: _Word | None, after: str, action: bool) -> bool:
    bare = not phrase.words and not phrase.determiner
    content = after in _CONTENT
    if word.kind == "ing":
        return phrase.noun or phrase.predicate or (phrase.named and not content) or (bare and (action or not content))
    if word.kind == "noun-ing":
        return phrase.noun and after == "determiner"
    if word.kind == "participle":
        return not content and (phrase.named or bare)
    joined = bare and action and before is not None and before.kind == "conjunction"
    if word.kind == "third":
        return (phrase.named or phrase.predicate or joined) and phrase.determiner not in _NUMBERS
    if word.kind == "base":
        plural = phrase.noun and (phrase.words[-1].text.endswith("s") or phrase.words[-1].text in _PLURALS)
        return plural or joined or (bare and before is not None and (before.text == "to" or before.kind == "be"))
    return False


def _classify(prompt: str) -> list[_Word]:
    """The words and marks of a prompt with their kinds; a relation counts as prepositions, adverbs are left out."""
    found = [(m.group().lower().replace("’", "'"), m.span()) for m in _TOKEN.finditer(prompt)]
    # The plural owner's apostrophe and quotes of that shape end nothing.
    words = [_Word(text, _kind(text), span) for text, span in found if text != "'"]
    words = [w for w in words if w.kind != "adverb"]
    i = 0
    while i < len(words):
        made = _made(words, i)
        stop = made if made > i else _relation(words, i)
        words[i:stop] = [_Word(w.text, "made" if made > i else "preposition", w.span) for w in words[i:stop]]
        i = max(stop, i + 1)
    return words


def _made(words: list[_Word], start: int) -> int:
    """Where "made of", "made from" or "made out of" that starts here ends, else `start`."""
    texts = [w.text for w in words[start : start + 3]]
    match = re.match(r"(?:out )?(?:of|from)\b", " ".join(texts[1:]))
    return start + 1 + len(match.group().split()) if match and texts[0] in _MADE else start


def _relation(words: list[_Word], start: int) -> int:
    """Where a relation that starts here ends ("left of", "on the left side of", "in the background"), else `start`."""
    i = start
    at = words[i].kind == "preposition" and words[i].text != "of"
    i += at
    the = i < len(words) and words[i].text in ("the", "its", "his", "her", "their")
    i += the
    first = i
    while i < len(words) and words[i].text in _PLACE_BEFORE | _PLACE:
        i += 1
    if i == first or words[i - 1].text not in _PLACE:
        return start
    after = words[i] if i < len(words) else None
    if after is not None and after.text == "of" and (at or the or words[first].text in ("left", "right")):
        return i + 1
    # "on the left chair" is no relation, "on the left" is, and so is "a cat right behind a dog".
    closed = after is None or after.kind not in _CONTENT or after.kind == "ing"
    if closed and ((at and the) or (i - first == 1 and words[first].text in _NEVER and not the)):
        return i
    return start


def _kind(text: str) -> str:
    for kind, lexicon in _LEXICON.items():
        if text in lexicon:
            return kind
    if text[0].isdigit():
        return "adjective" if text[-1].isalpha() else "determiner"  # "3d", "2"
    if not re.match(r"[a-z\u00c0-\u024f]", text):
        return "mark"  # punctuation, and words in a script that the rule cannot read
    if text.endswith("'s"):
        return "owner"
    stem, _, last = text.rpartition("-")
    if re.search(r"[aeiouy].*ing$", last):
        return "adjective" if stem else "noun-ing" if last in _NOUNS_ING else "ing"
    if re.search(r"[aeiouy].*ed$", last) and not last.endswith("eed") and last not in _NOUNS_ED:
        return "adjective" if stem else "participle"
    if last.endswith(("ous", "less", "esque", "istic", "ical")) or (last.endswith("ful") and last not in _MEASURES):
        return "adjective"
    if stem and last in ("like", "shaped", "sized", "style", "free", "size", "old", *_ADJECTIVES):
        return "adjective"
    if last.endswith("ly") and len(last) > 4 and last not in _NOUNS_LY and not last.endswith("fly"):
        return "adverb"
    return "noun"


_LEXICON: dict[str, frozenset[str]] = {
    "determiner": _DETERMINERS,
    "preposition": _PREPOSITIONS,
    "conjunction": _CONJUNCTIONS,
    "be": _BE,
    "pronoun": _PRONOUNS,
    "adverb": _ADVERBS,
    "adjective": _ADJECTIVES | _ADJECTIVES_LY,
    "material": _MATERIALS,
    "participle": _PARTICIPLES,
    "base": _BASES,
    "third": _THIRD,
}


def item_tokens(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[str | int] | None = None,
    attributes: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    """For each item the places of its text tokens in the tokenizer's encoding of the prompt, special tokens counted:
    the first word's is 1 after CLIP's BOS, and 0 with T5, which has none.

    `items` given by hand are words or phrases of the prompt, whole words in any case, one that stands there twice has
    the tokens of both; or numbers of words (see `spans_of`). Else `find_items` finds them, with their attributes where
    asked. A space that has a token of its own is no part of an item.
    `max_length` in tokens, special ones included; None is the tokenizer's own limit. Give the prompt as the
    pipeline hands it to its tokenizer (PixArt lower-cases it, which changes the tokens of a cased tokenizer).
    Raises ValueError for an item that is not in the prompt or that truncation cuts.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: use a fast tokenizer (`use_fast=True`)"
        )
    if items is None:
        named = [(item.noun, item.spans) for item in find_items(prompt, attributes)]
    elif isinstance(items, str) or not items:
        raise ValueError(f"items is a list of words of the prompt, not {items!r}")
    else:
        named = [(str(item), spans_of(item, prompt)) for item in items]
    # A limit of 1e30 is how transformers says that there is none.
    limit = max_length if max_length is not None else min(tokenizer.model_max_length, 2**31 - 1)
    whole = _offsets(tokenizer, prompt, verbose=False)
    kept = _offsets(tokenizer, prompt, truncation=True, max_length=limit)
    if len(kept) > limit:  # transformers gives up where the special tokens alone do not fit
        raise ValueError(f"max_length {limit} has no room for a prompt")
    result = []
    for name, spans in named:
        wanted, places = _covering(whole, spans), _covering(kept, spans)
        if not wanted:
            raise ValueError(f"the tokenizer has no token for {name!r} of the prompt {prompt!r}")
        if len(places) < len(wanted):
            raise ValueError(
                f"the item {name!r} is cut off: {len(whole)} tokens, {limit} kept, of the prompt {prompt!r}"
            )
        result.append(places)
    return result


def spans_of(item: str | int, prompt: str) -> tuple[Span, ...]:
    """Where a word or phrase stands in the prompt, any case and spacing, whole words only; or the word of a number.

    Numbers count words and punctuation marks from 0, as the official repository's files do: whatever the tokenizer, and
    without its special tokens. Raises ValueError where there is no such word.
    """
    if isinstance(item, int):
        found = [m.span() for m in _TOKEN.finditer(prompt)]
        if not 0 <= item < len(found) or not re.match(f"[{_MARKS}]", prompt[found[item][0]]):
            raise ValueError(
                f"the item {item} is no word of the prompt {prompt!r}: give the word, or its number, the first one's is 0"
            )
        return (found[item],)
    pattern = r"\s+".join(re.escape(part) for part in item.split())
    whole = rf"(?<![{_MARKS}])(?<![{_MARKS}]-){pattern}(?!-?[{_MARKS}])"
    spans = tuple(m.span() for m in re.finditer(whole, prompt, re.IGNORECASE)) if pattern else ()
    if not spans:
        raise ValueError(f"the item {item!r} is not in the prompt {prompt!r} as a whole word; {_HANDY}")
    return spans


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> list[Span]:
    """The characters that each token stands for: none, (0, 0), for special tokens and for a space alone."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, **options)
    # T5 spells a word that its vocabulary lacks as "▁" and pieces, and gives the mark the first letter's place.
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [(0, 0) if piece == "▁" else span for piece, span in zip(pieces, encoded["offset_mapping"], strict=True)]


def _covering(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The tokens that share a character with a span."""
    return [i for i, (start, end) in enumerate(offsets) if any(start < stop and end > begin for begin, stop in spans)]
