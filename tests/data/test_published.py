from pathlib import Path

import pytest

from czsl_heads.data.published import PUBLISHED, pairs_digest, published_name

SPLITS = Path(__file__).parents[3] / "shared" / "splits"


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_each_other(name):
    known = PUBLISHED[name]
    assert known.closed_world == known.pairs["train"] + known.unseen["val"] + known.unseen["test"]


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not here")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_lists_have_these_counts_and_digests(name):
    known, pairs = PUBLISHED[name], {}
    for split in ("train", "val", "test"):
        lines = (SPLITS / name / f"{split}_pairs.txt").read_text(encoding="utf-8").split("\n")
        pairs[split] = [tuple(line.split()) for line in lines if line.strip()]
        assert pairs_digest(pairs[split]) == known.digests[split]
        assert len(pairs[split]) == known.pairs[split]
    union = {pair for group in pairs.values() for pair in group}
    assert len(union) == known.closed_world
    assert len({attribute for attribute, _ in union}) == known.attributes
    assert len({obj for _, obj in union}) == known.objects
    for split, count in known.unseen.items():
        assert len(set(pairs[split]) - set(pairs["train"])) == count
    assert published_name(pairs) == name
    assert published_name({split: [*reversed(group)] for split, group in pairs.items()}) == name
    assert published_name({**pairs, "val": pairs["test"]}) is None
