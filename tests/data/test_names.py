"""Words of prompts: the tables by name, files of one's own with what is wrong in them, and names that say the same."""

import json

import pytest

from czsl_heads import CompositionSpace
from czsl_heads.data import DataError, read_dataset
from czsl_heads.data.names import prompt_names, same_prompts
from czsl_heads.space import clean_name

ZAPPOS = {
    "Canvas": "canvas",
    "Faux.Fur": "faux fur",
    "Faux.Leather": "faux leather",
    "Full.grain.leather": "full-grain leather",
    "Hair.Calf": "calf hair",
    "Patent.Leather": "patent leather",
    "Boots.Ankle": "ankle boots",
    "Boots.Knee.High": "knee-high boots",
    "Boots.Mid-Calf": "mid-calf boots",
    "Sandals": "sandals",
    "Shoes.Boat.Shoes": "boat shoes",
    "Shoes.Clogs.and.Mules": "clogs and mules",
    "Shoes.Flats": "flats",
    "Shoes.Heels": "heels",
    "Shoes.Loafers": "loafers",
    "Shoes.Oxfords": "oxford shoes",
    "Shoes.Sneakers.and.Athletic.Shoes": "sneakers and athletic shoes",
}
NAMES = ["Faux.Fur", "black_and_white", "dog"]


def said(names, table="published"):
    space = CompositionSpace(names, ["thing"], seen=[(0, 0)])
    return list(space.with_words(prompt_names(names, table)).attribute_words)


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_the_published_table_says_what_cleaning_says():
    names = [*ZAPPOS, "traffic_light"]
    assert prompt_names(names) == {}
    assert said(names) == [*map(clean_name, names)]


def test_the_clean_table_makes_zappos_english():
    assert said([*ZAPPOS], "clean") == [*ZAPPOS.values()]


def test_the_clean_table_opens_what_joins_words():
    names = ["black_and_white", "dry-erase_board", "Eiffel__Tower", "a._b", "plain", "_x_", "_"]
    assert said(names, "clean") == ["black and white", "dry-erase board", "eiffel tower", "a b", "plain", "x", "_"]


def test_only_what_is_not_said_anyway_is_returned(tmp_path):
    assert prompt_names(["Faux.Fur", "Hair.Calf", "dog"], "clean") == {"Hair.Calf": "calf hair"}
    table = write(tmp_path, "own.json", json.dumps({"Faux.Fur": "faux fur", "dog": "puppy"}))
    assert prompt_names(NAMES, table) == {"dog": "puppy"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.json", '{"Faux.Fur": "fake fur", "dog": "brûlé"}'),
        ("OWN.JSON", '\ufeff{"Faux.Fur": "fake fur", "dog": "brûlé"}'),
        ("own.yaml", "Faux.Fur: fake fur\ndog: brûlé\n"),
        ("own.yml", "# mine\n'Faux.Fur': fake fur\ndog: brûlé\n"),
        ("own.csv", "Faux.Fur,fake fur\ndog,brûlé"),
        ("own.csv", "Name, Words\r\n\r\nFaux.Fur , fake fur\r\ndog,brûlé\r\n"),
        ("own.csv", 'name,words\n"Faux.Fur","fake fur"\n,\ndog,brûlé\n'),
        ("own.tsv", "name\twords\nFaux.Fur\tfake fur\ndog\tbrûlé\n"),
    ],
)
def test_tables_of_all_kinds_say_the_same(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert prompt_names(NAMES, path) == {"Faux.Fur": "fake fur", "dog": "brûlé"}
    assert prompt_names(NAMES, tmp_path / name) == prompt_names(NAMES, path)


def test_words_with_a_comma_stand_in_quotes(tmp_path):
    assert prompt_names(NAMES, write(tmp_path, "own.csv", 'dog,"dog, a pet"')) == {"dog": "dog, a pet"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.json", "{'dog': 1}", r"cannot be read \(.*line 1 column 2"),
        ("own.json", '["dog"]', "expected a mapping of names to words, got list"),
        ("own.json", '{"dog": 3}', "expected words for each name, got 3 for 'dog'"),
        ("own.json", '{"dog": " "}', "expected words for each name, got ' ' for 'dog'"),
        ("own.yaml", "", "expected a mapping of names to words, got NoneType"),
        ("own.yaml", "dog: puppy\nFaux.Fur: [1", r"cannot be read \(.*line 2"),
        ("own.yaml", "dog: {a: b}", "expected words for each name, got {'a': 'b'} for 'dog'"),
        ("own.yaml", "no: never", "expected words for each name, got 'never' for False"),
        ("own.csv", "dog,puppy\nFaux.Fur", "line 2: expected a name and its words, got 1 column$"),
        ("own.csv", "dog,puppy\nFaux.Fur,a,b", "line 2: expected a name and its words, got 3 columns"),
        ("own.csv", "\ndog,", "line 2: expected a name and its words, got '' for 'dog'"),
        ("own.csv", ",puppy", "line 1: expected a name and its words, got 'puppy' for ''"),
        ("own.csv", "dog,a\ndog,b", "line 2: expected a name and its words, got 'dog' again"),
        ("own.csv", 'dog,"puppy\n', "expected a name and its words, got unexpected end of data"),
        ("own.tsv", "dog,puppy", "line 1: expected a name and its words, got 1 column$"),
        ("own.txt", "dog puppy", r"to be \"published\", \"clean\" or a file that ends in .json, .*, got none of these"),
        ("own.csv", "Faux.Fir,fake fur", "expected names of the data set, got 'Faux.Fir'; did you mean 'Faux.Fur'"),
        ("own.json", '{"zebra": "horse"}', "expected names of the data set, got 'zebra'$"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_with_its_file(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        prompt_names(NAMES, path)


def test_a_table_in_another_encoding_is_told(tmp_path):
    path = write(tmp_path, "own.csv", "dog,brûlé", encoding="latin-1")
    with pytest.raises(DataError, match=r"own.csv: expected names and words in UTF-8, got a file that cannot be read"):
        prompt_names(NAMES, path)


@pytest.mark.parametrize("table", ["claen", "none.json", "."])
def test_a_table_that_is_not_there_is_told(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'expected `names` to be "published", "clean" or a file .* got no such file'):
        prompt_names(NAMES, table)


def test_a_data_set_is_read_with_its_words(root, tmp_path):
    table = write(tmp_path, "own.csv", "wet,soaking wet\ncat,kitten")
    published, own = read_dataset(root).space, read_dataset(root, names=table).space
    assert own.words == {"wet": "soaking wet", "cat": "kitten"}
    assert own.with_words({}) == published
    assert own.pair_names == published.pair_names


def test_names_that_say_the_same_are_found():
    names = ["wet", "Wet", "old"], ["dog", "hot.dog", "hot dog", "Hot.Dog"]
    space = CompositionSpace(*names, seen=[("wet", "dog"), ("Wet", "dog"), ("old", "dog")])
    assert same_prompts(space) == [("wet", "Wet"), ("hot.dog", "hot dog", "Hot.Dog")]
    assert same_prompts(space.with_words({"Wet": "soaked", "hot dog": "sausage", "Hot.Dog": "bun"})) == []


def test_words_may_make_names_alike():
    space = CompositionSpace(["wet", "soaked"], ["dog"], seen=[(0, 0)], words={"soaked": "wet"})
    assert same_prompts(space) == [("wet", "soaked")]


def test_an_attribute_may_be_called_as_an_object():
    assert same_prompts(CompositionSpace(["orange"], ["orange"], seen=[(0, 0)])) == []


@pytest.mark.parametrize("blank", [" ", "."])
def test_pairs_that_say_the_same_are_found(blank):
    names = ["dark", f"dark{blank}red", "Dark"], ["car", f"red{blank}car"]
    space = CompositionSpace(*names, seen=[(1, 0)], unseen=[(0, 1), (2, 1), (0, 0), (2, 0)])
    pairs = f"dark{blank}red + car", f"dark + red{blank}car"
    assert same_prompts(space) == [("dark", "Dark"), pairs]
    assert same_prompts(space.subset([(1, 0), (0, 0)])) == [("dark", "Dark")]
