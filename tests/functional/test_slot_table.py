"""The table of a memory against one that stores row by row, in Python."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.slot_table import SlotTable

PAIRS, SLOTS = 4, 2
SIZES = {"num_pairs": PAIRS, "slots": SLOTS}
batches = st.lists(st.lists(st.tuples(st.integers(0, PAIRS), st.sampled_from([0.1, 0.2, 0.3])), max_size=6), max_size=5)


def stored(rows):
    """``(pair, entropy, arrival)`` of all rows, in the order of the table's :meth:`sort`."""
    return [(pair, *entry) for pair, row in enumerate(rows) for entry in sorted(row)]


@given(batches=batches)
@settings(deadline=None, max_examples=60)
def test_it_keeps_what_rows_of_few_slots_would(batches):
    table = SlotTable.empty(torch.zeros(0, 1)).grow(PAIRS * SLOTS + 7, num_pairs=PAIRS)
    rows, arrivals = [[] for _ in range(PAIRS)], 0
    for batch in batches:
        arrival = torch.arange(arrivals, arrivals + len(batch))
        for number, (pair, entropy) in zip(arrival.tolist(), batch):
            if pair < PAIRS:  # all others go nowhere
                rows[pair] = sorted([*rows[pair], (entropy, number)])[:SLOTS]
        arrivals += len(batch)

        before = table
        pair = torch.tensor([pair for pair, _ in batch], dtype=torch.long)
        entropy = torch.tensor([entropy for _, entropy in batch])
        table = table.place(arrival[:, None].float(), pair, entropy, arrival, **SIZES)

        found = table.sort(**SIZES)
        expected = stored(rows)
        assert found.pair.tolist() == [entry[0] for entry in expected]
        assert found.arrival.tolist() == [entry[2] for entry in expected]
        assert found.features[:, 0].tolist() == found.arrival.tolist()  # each vector is its own arrival
        torch.testing.assert_close(found.entropy, torch.tensor([entry[1] for entry in expected]))
        # What stays has its old place, and the last place stays free.
        places = dict(zip(before.arrival[before.pair < PAIRS].tolist(), (before.pair < PAIRS).nonzero().squeeze(1)))
        for place in (table.pair < PAIRS).nonzero().squeeze(1):
            assert places.get(int(table.arrival[place]), place) == place
        assert table.pair[-1] == PAIRS


def test_growing_adds_free_places_and_copies():
    table = SlotTable.empty(torch.zeros(0, 3)).grow(2, num_pairs=PAIRS)
    table = table.place(torch.ones(1, 3), torch.tensor([1]), torch.tensor([0.5]), torch.tensor([0]), **SIZES)
    grown = table.grow(5, num_pairs=PAIRS)
    assert grown.pair.tolist() == [1, PAIRS, PAIRS, PAIRS, PAIRS]
    grown.features.zero_()
    assert table.features[0].tolist() == [1.0, 1.0, 1.0]
