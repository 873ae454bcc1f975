from __future__ import annotations

import random
from itertools import product
from typing import Any

import open_clip
import pytest
from clip_bpe import clip_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

from bench_dfusion.micro.pretrain import make_tokenizer
from bench_dfusion.micro.prompts import SPLITS, compositions, prompts
from bench_dfusion.micro.scenes import PLURALS, TEMPLATES, Spec, parse, random_spec
from bench_dfusion.tracks.items import find_items, item_tokens

MICRO = make_tokenizer()
CLIP = clip_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [MICRO, CLIP], ids=["micro", "clip"])


def nouns(prompt: str) -> list[str]:
    return [item.noun for item in find_items(prompt)]


def shapes(spec: Spec) -> list[str]:
    return [PLURALS[t.shape] if spec.count > 1 else t.shape for t in spec.things]


def spelled(tokenizer: CLIPTokenizer, prompt: str, places: list[list[int]]) -> list[str]:
    ids = tokenizer(prompt).input_ids
    return [str(tokenizer.decode([ids[i] for i in item])) for item in places]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # the paper's and DDPO's templates
        ("a black and woolen bus", ["bus"]),
        ("a cat eating a sandwich", ["cat", "sandwich"]),
        ("a monkey washing dishes", ["monkey", "dishes"]),
        ("a butterfly riding a bike", ["butterfly", "bike"]),
        ("the king playing chess", ["king", "chess"]),
        ("a dog on top of a car", ["dog", "car"]),
        ("a red and leather sofa", ["sofa"]),
        ("three green rings", ["rings"]),
        ("a cyan triangle above a yellow cross", ["triangle", "cross"]),
        ("two dogs and three cats", ["dogs", "cats"]),
        ("a horse and a cow in a field", ["horse", "cow", "field"]),
        ("a wooden spoon and a glass bottle", ["spoon", "bottle"]),
        # places are no items, unless they are things
        ("a red ring left of a blue square", ["ring", "square"]),
        ("a red ring to the right of a blue square", ["ring", "square"]),
        ("a cat on the left side of a dog", ["cat", "dog"]),
        ("on the left a cat, on the right a dog", ["cat", "dog"]),
        ("a cat right behind a dog in the background", ["cat", "dog"]),
        ("a woman wearing a red top on a chair", ["woman", "top", "chair"]),
        ("the left shoe at the back door", ["shoe", "door"]),
        # -ing, -ed and other verbs
        ("a dog riding a bike on the beach", ["dog", "bike", "beach"]),
        ("a cute sleeping cat", ["cat"]),
        ("a brick building", ["building"]),
        ("a man building a house", ["man", "house"]),
        ("a glass sitting on a table", ["glass", "table"]),
        ("a dog running and jumping", ["dog"]),
        ("a man reading a book and drinking coffee", ["man", "book", "coffee"]),
        ("a cat being washed by a woman", ["cat", "woman"]),
        ("a snow covered mountain surrounded by trees", ["mountain", "trees"]),
        ("a cat sits on a mat", ["cat", "mat"]),
        ("two dogs play chess", ["dogs", "chess"]),
        ("a dog ready to eat a bone", ["dog", "bone"]),
        ("the dog is brown and sits on a mat", ["dog", "mat"]),
        # adjectives alone, and words that are adjective or noun
        ("the sky is blue and the grass is green", ["sky", "grass"]),
        ("a black and a white dog", ["dog"]),
        ("an orange and a banana", ["orange", "banana"]),
        ("a large, fluffy and happy dog", ["dog"]),
        # openings, measures, lists, spelling
        ("a photo of a corgi wearing a red scarf", ["corgi", "scarf"]),
        ("An oil painting of a Fox.", ["Fox"]),
        ("a photo of a painting of a cat", ["painting", "cat"]),
        ("a pair of red shoes on the floor", ["shoes", "floor"]),
        ("a bear, a lion and a tiger", ["bear", "lion", "tiger"]),
        ("a dog's bone and a t-shirt", ["bone", "t-shirt"]),
        ("cat", ["cat"]),
    ],
)
def test_heads_of_noun_phrases(prompt: str, expected: list[str]) -> None:
    assert nouns(prompt) == expected
    assert nouns(prompt.upper()) == [noun.upper() for noun in expected]


def test_attributes() -> None:
    prompt = "a  black and woolen bus made of brick, 2 dogs"
    bus, dogs = find_items(prompt)
    assert (bus.noun, bus.attributes) == ("bus", ("black", "woolen", "brick"))
    assert (dogs.noun, dogs.attributes) == ("dogs", ())
    assert [prompt[a:b] for a, b in bus.spans] == ["bus"]
    bus, dogs = find_items(prompt, attributes=True)
    assert [prompt[a:b] for a, b in bus.spans] == ["black", "woolen", "bus", "brick"]
    assert [prompt[a:b] for a, b in dogs.spans] == ["dogs"]
    assert spelled(CLIP, prompt, item_tokens(prompt, CLIP, attributes=True)) == ["black woolen bus brick", "dogs"]


@pytest.mark.parametrize("prompt", ["", "red", "running", "a black and white", "to the left of", "一只猫", "🐶"])
def test_nothing_found(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"items=") as error:
        find_items(prompt)
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("split", SPLITS)
def test_micro_prompts(split: str) -> None:
    listed = [*prompts(split), *(s.prompt for family in compositions()[split].values() for s in family)]
    for prompt in listed:
        assert nouns(prompt) == shapes(parse(prompt))


specs = st.builds(
    lambda template, seed: random_spec(template, random.Random(seed)), st.sampled_from(TEMPLATES), st.integers(0, 2**32)
)


@given(specs)
def test_micro_grammar(spec: Spec) -> None:
    expected = shapes(spec)
    assert nouns(spec.prompt) == expected
    places = item_tokens(spec.prompt, MICRO)
    assert [len(p) for p in places] == [1] * len(expected)
    assert spelled(MICRO, spec.prompt, places) == expected
    assert spelled(CLIP, spec.prompt, item_tokens(spec.prompt, CLIP)) == expected


@BOTH
@given(spec=specs, data=st.data())
@settings(max_examples=50)
def test_spacing_and_case_change_nothing(tokenizer: CLIPTokenizer, spec: Spec, data: st.DataObject) -> None:
    gap = st.text(" \t\n", max_size=3)
    words = [data.draw(st.sampled_from([w, w.upper(), w.title()])) for w in spec.prompt.split()]
    prompt = "".join(data.draw(gap) + " " * bool(i) + w for i, w in enumerate(words)) + data.draw(gap)
    assert item_tokens(prompt, tokenizer) == item_tokens(spec.prompt, tokenizer)
    by_hand = item_tokens(prompt, tokenizer, items=shapes(spec))
    assert by_hand == item_tokens(spec.prompt, tokenizer)


HARD = """a the two cat dog's ring running building made of out from left right to and , . red glass sits is be photo"""
jumbles = st.lists(st.sampled_from(HARD.split())).map(" ".join)


@given(st.one_of(st.text(), jumbles))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(prompt: str) -> None:
    try:
        items = find_items(prompt, attributes=True)
    except ValueError:
        return
    assert items
    for item in items:
        assert list(item.spans) == sorted(set(item.spans))
        assert sorted(prompt[a:b] for a, b in item.spans) == sorted((item.noun, *item.attributes))
    seen = [span for item in items for span in item.spans]
    assert len(seen) == len(set(seen))  # a word belongs to one item


@BOTH
@pytest.mark.parametrize(
    "prompt",
    [
        "  A  Red   RING  and a Café",
        "a cafe\u0301 and a \u0130 ring",
        "🐶 a ring\tand  a ﬁsh",
        "a dog’s ring, 12 CATS!",
    ],
)
def test_offsets_are_the_prompts_own(tokenizer: CLIPTokenizer, prompt: str) -> None:
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    for place in item_tokens(prompt, tokenizer, items=["ring"])[0]:
        start, stop = offsets[place]
        assert prompt[start:stop].lower() in "ring"
    covered = {i for start, stop in offsets for i in range(start, stop)}
    # A combining accent has no token of its own.
    assert {i for i, c in enumerate(prompt) if not c.isspace() and c != "\u0301"} <= covered


def test_words_of_several_tokens() -> None:
    prompt = "a photo of an axolotl wearing a t-shirt"
    axolotl, shirt = item_tokens(prompt, CLIP)
    assert len(axolotl) > 1 and axolotl == list(range(axolotl[0], axolotl[-1] + 1))
    assert spelled(CLIP, prompt, [axolotl, shirt]) == ["axolotl", "t - shirt"]


def test_bos_is_zero() -> None:
    assert item_tokens("cat", CLIP) == [[1]]
    assert item_tokens("a cat eating a sandwich", CLIP) == [[2], [5]]


def test_items_by_hand() -> None:
    prompt = "A Dog  house near a dog and a hot-dog stand"
    assert item_tokens(prompt, CLIP, items=["dog house"]) == [[2, 3]]
    assert item_tokens(prompt, CLIP, items=["stand", "DOG"]) == [[12], [2, 6]]
    assert item_tokens(prompt, CLIP, items=["hot-dog"]) == [[9, 10, 11]]
    for missing in ("cat", "do", "hot", "house dog", "", " "):
        with pytest.raises(ValueError) as error:
            item_tokens(prompt, CLIP, items=[missing])
        assert repr(missing) in str(error.value) and repr(prompt) in str(error.value)
    with pytest.raises(ValueError, match="list of words"):
        item_tokens(prompt, CLIP, items="dog")
    with pytest.raises(ValueError, match="list of words"):
        item_tokens(prompt, CLIP, items=[])


@BOTH
def test_truncation_is_an_error_naming_the_item(tokenizer: CLIPTokenizer) -> None:
    prompt = "a red ring above a blue square"
    whole = [[3], [7]]
    assert item_tokens(prompt, tokenizer) == whole
    assert item_tokens(prompt, tokenizer, max_length=9) == whole
    assert item_tokens(prompt, tokenizer, items=["ring"], max_length=5) == [[3]]
    with pytest.raises(ValueError, match="'square' is cut off"):
        item_tokens(prompt, tokenizer, max_length=8)
    with pytest.raises(ValueError, match="no room"):
        item_tokens(prompt, tokenizer, max_length=1)
    for length in (4, 2):
        with pytest.raises(ValueError, match="'ring' is cut off"):
            item_tokens(prompt, tokenizer, max_length=length)


def test_the_tokenizers_own_limit_counts() -> None:
    prompt = "a red ring " + "and a red ring " * 5
    with pytest.raises(ValueError, match="cut off"):
        item_tokens(prompt, MICRO)
    assert len(item_tokens(prompt, CLIP)) == 6


def test_partly_cut_words_are_cut() -> None:
    prompt = "an axolotl"
    length = len(CLIP(prompt).input_ids)
    assert item_tokens(prompt, CLIP, max_length=length)
    with pytest.raises(ValueError, match="'axolotl' is cut off"):
        item_tokens(prompt, CLIP, max_length=length - 1)


# ---------------------------------------------------------------- T5's tokenizer (PixArt, SD3, FLUX): no BOS, "▁"

# Every letter has a piece, so that any English word is spelled, some by several pieces after a "▁" of its own.
WORDS = [
    "▁a",
    "▁red",
    "▁and",
    "▁cat",
    "▁ri",
    "ng",
    "▁rings",
    "axo",
    "lot",
    "▁t",
    "sh",
    "▁dog",
    "▁house",
    "fish",
    "▁the",
]
PIECES = [
    *((special, 0.0) for special in ("<pad>", "</s>", "<unk>")),
    *((piece, -3.0) for piece in WORDS),
    *((letter, -6.0) for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'-,."),
]


def t5_tokenizer(split: str = "its own") -> T5TokenizerFast:
    """As transformers makes it; or split as files converted from SentencePiece have it, the space in a word's offsets."""
    tokenizer = T5TokenizerFast(vocab=PIECES, extra_ids=0)
    backend = tokenizer.backend_tokenizer
    if split != "its own":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split == "words")
    if split == "text":
        spaces = normalizers.Replace(Regex(" {2,}"), "▁")
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False), spaces])
    return tokenizer


SPLITS_OF_T5 = {split: t5_tokenizer(split) for split in ("its own", "words", "text")}
T5 = pytest.mark.parametrize("tokenizer", SPLITS_OF_T5.values(), ids=SPLITS_OF_T5)


def pieces(tokenizer: T5TokenizerFast, prompt: str, items: list[str | int] | None = None, **options: Any) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens[-1] == "</s>"
    return [" ".join(tokens[i] for i in item) for item in item_tokens(prompt, tokenizer, items, **options)]


@T5
def test_t5s_pieces_of_an_item(tokenizer: T5TokenizerFast) -> None:
    assert item_tokens("a cat", tokenizer) == [[1]] and item_tokens("cat", tokenizer) == [[0]]
    assert pieces(tokenizer, "a red ring and a cat") == ["▁ri ng", "▁cat"]
    assert pieces(tokenizer, "a red ring and a cat", attributes=True) == ["▁red ▁ri ng", "▁cat"]
    assert pieces(tokenizer, "an axolotl, a t-shirt") == ["axo lot l", "▁t - sh i r t"]
    assert pieces(tokenizer, "A  Cat   and the DOG.") == ["C a t", "D O G"]  # other pieces than in lower case
    assert pieces(tokenizer, "the dog's fish") == ["fish"]
    by_hand = pieces(tokenizer, "A red axolotl near a dog  house", ["dog house", "RED", "red axolotl"])
    assert by_hand == ["▁dog ▁house", "▁red", "▁red axo lot l"]
    if tokenizer is SPLITS_OF_T5["text"]:
        assert pieces(tokenizer, "a  cat  or \ufb01sh  ", ["cat", "\ufb01sh"]) == ["▁cat", "fish"]


@T5
@given(spec=specs, data=st.data())
@settings(max_examples=50, deadline=None)
def test_t5s_pieces_spell_the_item_and_nothing_beside_it(
    tokenizer: T5TokenizerFast, spec: Spec, data: st.DataObject
) -> None:
    words = [data.draw(st.sampled_from([w, w.upper(), w.title()])) for w in spec.prompt.split()]
    prompt = data.draw(st.sampled_from([" ", "  ", "   "])).join(words)
    spelt = [item.replace(" ", "").replace("▁", "").lower() for item in pieces(tokenizer, prompt)]
    assert spelt == shapes(spec)


@T5
def test_t5s_end_token_takes_its_place_in_the_limit(tokenizer: T5TokenizerFast) -> None:
    prompt = "a red axolotl"
    length = len(tokenizer(prompt).input_ids)
    assert length == 7  # ▁a ▁red ▁ axo lot l </s>
    assert item_tokens(prompt, tokenizer, max_length=length) == [[3, 4, 5]]
    for short in range(1, length):
        with pytest.raises(ValueError, match="'axolotl' is cut off"):
            item_tokens(prompt, tokenizer, max_length=short)
    assert item_tokens(prompt, tokenizer, items=["red"], max_length=3) == [[1]]


@pytest.mark.parametrize("tokenizer", [CLIP, *SPLITS_OF_T5.values()], ids=["clip", *SPLITS_OF_T5])
def test_numbers_count_words_whatever_the_tokenizer(tokenizer: CLIPTokenizer) -> None:
    """In the official repository's file item 4 of the first prompt is the bus, which CLIP has as its token 6."""
    prompts: dict[str, dict[int, str]] = {
        "a black and woolen bus": {4: "bus", 3: "woolen"},
        "the computer below the counter": {1: "computer", 4: "counter"},
        "a dog, a  T-shirt and a dog": {1: "dog", 4: "T-shirt"},
    }
    for prompt, words in prompts.items():
        once = {n: w for n, w in words.items() if w != "dog"}
        assert item_tokens(prompt, tokenizer, list(once)) == item_tokens(prompt, tokenizer, list(once.values()))
    first, both = (item_tokens("a dog, a  T-shirt and a dog", tokenizer, [dog])[0] for dog in (1, "dog"))
    assert len(both) > len(first) and both[: len(first)] == first
    for number in (-1, 2, 8):  # 2 is the comma
        with pytest.raises(ValueError, match=rf"item {number} is no word of the prompt 'a dog, a"):
            item_tokens("a dog, a  T-shirt and a dog", tokenizer, [number])


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="fast"):
        item_tokens("a cat", open_clip.SimpleTokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat",
        "A Black and Woolen BUS",
        "  a  dog   riding a bike ",
        "an axolotl's t-shirt, 1990s style!!",
        "it's a dog that can't swim; they'll see",
        "a café in Zürich",
        "一只猫 and a 🐶",
        "3.5 million (very) small ants",
        "a pneumonoultramicroscopicsilicovolcanoconiosis ward",
        "trending on artstation | 8k:1.2",
        "привет, мир",
        "snow_white & the_seven dwarfs",
        "",
    ],
)
def test_the_helper_is_openais_clip(prompt: str) -> None:
    reference = open_clip.SimpleTokenizer()
    same = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert CLIP.get_vocab() == {same.get(token, token): i for token, i in reference.encoder.items()}
    assert CLIP(prompt).input_ids == [49406, *reference.encode(prompt), 49407]
    padded = CLIP(prompt, padding="max_length", max_length=77).input_ids
    row = reference(prompt)[0].tolist()
    end = row.index(49407)  # open_clip pads with 0, transformers with the end token
    assert padded[: end + 1] == row[: end + 1]


def test_every_pair_of_plain_nouns_survives_the_conjunction() -> None:
    for a, b in product(("cat", "ring", "king", "bus"), repeat=2):
        assert nouns(f"a {a} and {b}") == [a, b]
