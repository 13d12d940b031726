"""Slow and obvious twins of the functions of the package: loops, full matrices, no cleverness."""

import math

import numpy as np
import torch


def reference_maxsim(tokens, texts, *, k=1):
    """Scores and the chosen tokens, best first, the lowest index first among equals."""
    tokens, texts = tokens.double(), texts.double()
    batch, num_texts = len(tokens), texts.shape[-2]
    scores = torch.empty(batch, num_texts, dtype=torch.float64)
    index = torch.empty(batch, num_texts, k, dtype=torch.long)
    for b in range(batch):
        for c in range(num_texts):
            text = texts[c] if texts.ndim == 2 else texts[b, c]
            products = [float(sum(token * text)) for token in tokens[b]]
            best = sorted(range(len(products)), key=lambda token: (-products[token], token))[:k]
            scores[b, c] = sum(products[token] for token in best) / k
            index[b, c] = torch.tensor(best)
    return scores, index


def reference_alignment(tokens, texts, *, reduce, k=None, temperature=0.01, include_cls=True, cls_weight=0.0):
    """Cosines one by one, then the reduction as its formula reads."""
    scores = torch.empty(len(tokens), texts.shape[-2], dtype=torch.float64)
    for b, image in enumerate(tokens.double()):
        for c, text in enumerate((texts if texts.ndim == 2 else texts[b]).double()):
            cosines = [float(token @ text / (token.norm() * text.norm())) for token in image]
            used = cosines if include_cls else cosines[1:]
            reduced = {
                "max": lambda used=used: max(used),
                "topk": lambda used=used: sum(sorted(used)[-k:]) / k,
                "mean": lambda used=used: sum(used) / len(used),
                "cls": lambda cosines=cosines: cosines[0],
                "logsumexp": lambda used=used: (
                    temperature * math.log(sum(math.exp(s / temperature) for s in used) / len(used))
                ),
            }[reduce]()
            scores[b, c] = (1 - cls_weight) * reduced + cls_weight * cosines[0]
    return scores


def first_columns(scores, k):
    """Columns of the ``k`` largest scores; the lowest first among equals."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def topk_columns(scores, k):
    """As the official code ranks; among equals the lowest column comes first on the CPU from 64 columns on."""
    return scores.topk(k, dim=1).indices


def reference_czsl_scores(
    scores, target, pair_attr, pair_obj, seen_mask, eval_mask=None, *, topk=1, columns=first_columns
):
    """The field's standard evaluation on the full matrix, pass by pass."""
    scores, unseen = scores.float(), ~seen_mask
    candidates = torch.ones_like(seen_mask) if eval_mask is None else eval_mask
    seen_sample = seen_mask[target]
    true_attr, true_obj = pair_attr[target, None], pair_obj[target, None]

    def hits(bias):
        """Of each sample: the pair, the attribute, the object right among the top k."""
        biased = scores.clone()
        biased += bias * unseen
        biased[:, ~candidates] = -1e10
        top = columns(biased, topk)
        attr, obj = pair_attr[top] == true_attr, pair_obj[top] == true_obj
        return (attr & obj).any(1), attr.any(1), obj.any(1)

    def share(right):
        return right.double().mean().item()

    def point(bias):
        pair, attr, obj = hits(bias)
        parts = {"match": pair, "seen": pair[seen_sample], "unseen": pair[~seen_sample], "attr": attr, "obj": obj}
        return {name: share(right) for name, right in parts.items()}

    kept = ~seen_sample & hits(torch.tensor(1e3))[0]
    of_seen = scores[kept][:, seen_mask].topk(topk, dim=1).values[:, -1] if kept.any() else torch.empty(0)
    margins = (of_seen - scores[kept, target[kept]] - 1e-4).sort().values
    biases = [*margins[:: max(len(margins) // 20, 1)], torch.tensor(1e3)]
    curve = [(values["seen"], values["unseen"]) for values in map(point, biases)]
    area = float(np.trapezoid(*zip(*curve)))
    means = [0.0 if 0.0 in values else 2 / (1 / values[0] + 1 / values[1]) for values in curve]
    # The official accuracies are float32, and among equal means their rounding picks the point.
    ranked = [[float(np.float32(value)) for value in values] for values in curve]
    ranked = [0.0 if 0.0 in values else 2 / (1 / values[0] + 1 / values[1]) for values in ranked]
    best = ranked.index(max(ranked))
    unbiased, biased = point(torch.tensor(0.0)), point(torch.tensor(1e3))
    return {
        "seen": max(seen for seen, _ in curve),
        "unseen": max(unseen for _, unseen in curve),
        "harmonic_mean": means[best],
        "auc": area,
        "hm_seen": curve[best][0],
        "hm_unseen": curve[best][1],
        "bias": float(biases[best]),
        "attr_accuracy": unbiased["attr"],
        "obj_accuracy": unbiased["obj"],
        "unbiased": unbiased,
        "biased": biased,
        "curve": [list(values) for values in curve],
    }


def reference_exact_curve(scores, target, seen_mask, eval_mask=None, *, topk=1):
    """Points ``(seen, unseen)``: the bias goes to the middle between all neighbouring differences of two scores."""
    scores = scores.double().numpy()
    target, seen = target.numpy(), seen_mask.numpy()
    candidates = np.ones_like(seen) if eval_mask is None else eval_mask.numpy()
    seen_sample = seen[target]
    of_seen, of_unseen = scores[:, seen & candidates], scores[:, ~seen & candidates]
    with np.errstate(invalid="ignore"):
        steps = np.unique(of_seen[:, :, None] - of_unseen[:, None, :])
    steps = steps[np.isfinite(steps)]
    ends = [steps[0] - 1, *(steps[:-1] + steps[1:]) / 2, steps[-1] + 1] if len(steps) else [0.0]
    points = []
    for bias in ends:
        biased = np.where(seen, scores, scores + bias)
        biased[:, ~candidates] = -np.inf
        top = np.argsort(-biased, axis=1, kind="stable")[:, :topk]
        right = (top == target[:, None]).any(1) & np.isfinite(scores[np.arange(len(target)), target])
        values = (float(right[seen_sample].mean()), float(right[~seen_sample].mean()))
        if not points or points[-1] != values:
            points.append(values)
    return points


def reference_distillation(student_logits, teacher_logits, *, direction="reverse"):
    """Term by term; a pair of probability 0 on the left adds nothing."""
    total = 0.0
    for student, teacher in zip(student_logits.double().tolist(), teacher_logits.double().tolist()):
        left, right = (student, teacher) if direction == "reverse" else (teacher, student)
        p_sum, q_sum = math.fsum(map(math.exp, left)), math.fsum(map(math.exp, right))
        for p_logit, q_logit in zip(left, right):
            p, q = math.exp(p_logit) / p_sum, math.exp(q_logit) / q_sum
            if p > 0:
                total += p * math.log(p / q) if q > 0 else math.inf
    return total / len(student_logits)


@torch.no_grad()
def reference_condenser(condenser, tokens):
    """Image by image and head by head, every token projected; the unit rows, and the last block's mean weights."""
    size = condenser.dim // condenser.num_heads
    vectors, attention = [], []
    for image in tokens:
        norm = condenser.token_norm
        mean, variance = image.mean(-1, keepdim=True), image.var(-1, unbiased=False, keepdim=True)
        image = (image - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        query = condenser.query
        for block in condenser.blocks:
            read, weights = [], []
            for head in range(condenser.num_heads):
                rows = slice(head * size, (head + 1) * size)
                asked = block.query_proj.weight[rows] @ query
                keys = [block.key_proj.weight[rows] @ token for token in image]
                values = [block.value_proj.weight[rows] @ token for token in image]
                scores = [float(asked @ key) / math.sqrt(size) for key in keys]
                exps = [math.exp(score - max(scores)) for score in scores]
                weights.append([value / sum(exps) for value in exps])
                read.append(sum(weight * value for weight, value in zip(weights[-1], values)))
            query = query + block.out_proj.weight @ torch.cat(read) + block.out_proj.bias
            normed = (query - query.mean()) / (query.var(unbiased=False) + block.mlp_norm.eps).sqrt()
            hidden = block.mlp_in(normed * block.mlp_norm.weight + block.mlp_norm.bias)
            query = query + block.mlp_out(hidden / (1 + (-1.702 * hidden).exp()))
        vectors.append(query / query.square().sum().sqrt())
        attention.append(torch.tensor(weights, dtype=query.dtype).mean(0))
    return torch.stack(vectors), torch.stack(attention)


def reference_relative_modality_gap(images, texts, *, labels=None, include_self=False):
    """All pairs, one by one."""
    images, texts = images.double(), texts.double()

    def distance(one, other):
        return (1 - float(one @ other / (one.norm() * other.norm()))) / 2

    def mean_within(vectors):
        size = range(len(vectors))
        pairs = [(i, j) for i in size for j in size if include_self or i != j]
        return sum(distance(vectors[i], vectors[j]) for i, j in pairs) / len(pairs)

    labels = range(len(images)) if labels is None else labels.tolist()
    matched = sum(distance(image, texts[label]) for image, label in zip(images, labels)) / len(images)
    return matched / (matched + (mean_within(images) + mean_within(texts)) / 2)


def reference_uniformity(vectors):
    """All ordered pairs, one by one."""
    unit = [vector / vector.norm() for vector in vectors.double()]
    size = range(len(unit))
    potentials = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in size for j in size if i != j]
    return math.log(sum(potentials) / len(potentials))


def reference_cross_uniformity(images, texts, labels):
    """Each image against each text of another label, one by one."""
    images, texts = images.double(), texts.double()
    potentials = []
    for image, label in zip(images, labels.tolist()):
        for column, text in enumerate(texts):
            if column != label:
                distance = image / image.norm() - text / text.norm()
                potentials.append(math.exp(-2 * float(distance.square().sum())))
    return math.log(sum(potentials) / len(potentials))


def reference_mix_experts(tokens, down, up, weights, experts):
    """Token by token, and expert by expert."""
    mixed = torch.zeros_like(tokens)
    for row, token in enumerate(tokens):
        for weight, expert in zip(weights[row], experts[row].tolist()):
            mixed[row] += weight * (up[expert] @ (down[expert] @ token))
    return mixed


def reference_bank_insert(row, entry):
    """One insertion into a row of slots, ``None`` if free; an entry is ``(is_text, entropy, arrival, vector)``."""
    if None in row:
        row[row.index(None)] = entry
        return
    worst = max(range(len(row)), key=lambda slot: row[slot][:3])
    if entry[:2] < row[worst][:2]:  # strictly: among equals the earlier stays
        row[worst] = entry


def reference_merge_best(pair_index, entropy, *, num_pairs, slots):
    """Entries inserted one at a time; those that stay, by pair, entropy and arrival."""
    rows = [[None] * slots for _ in range(num_pairs)]
    for arrival, (pair, value) in enumerate(zip(pair_index.tolist(), entropy.tolist())):
        if pair < num_pairs:
            reference_bank_insert(rows[pair], (False, value, arrival, None))
    return [entry[2] for row in rows for entry in sorted(entry for entry in row if entry is not None)]


def reference_prediction_entropy(probs):
    rows = probs.double().tolist()
    return torch.tensor([-math.fsum(p * math.log(p) for p in row if p > 0) for row in rows], dtype=torch.float64)


def reference_retrieve_prototypes(features, rows, *, temperature, empty, normalize):
    """Prototypes ``[batch, pairs, dim]`` from dense rows: of each pair a list of vectors, ``None`` for a free slot."""
    features = features.double()
    prototypes = torch.zeros(len(features), len(rows), features.shape[1], dtype=torch.float64)
    for b, feature in enumerate(features):
        for i, row in enumerate(rows):
            slots = [torch.zeros_like(feature) if vector is None and empty == "zero" else vector for vector in row]
            slots = [vector.double() for vector in slots if vector is not None]
            exponents = [float(feature / feature.norm() @ vector) / temperature for vector in slots]
            total = sum(math.exp(exponent - max(exponents)) for exponent in exponents)
            for vector, exponent in zip(slots, exponents):
                prototypes[b, i] += math.exp(exponent - max(exponents)) / total * vector
            if normalize and prototypes[b, i].any():
                prototypes[b, i] /= prototypes[b, i].norm()
    return prototypes


def reference_retrieve(features, rows, *, temperature, empty, normalize):
    """Scores ``[batch, pairs]``: the product of each feature with its prototype, -inf for rows masked as empty."""
    prototypes = reference_retrieve_prototypes(
        features, rows, temperature=temperature, empty=empty, normalize=normalize
    )
    features = features.double()
    scores = torch.empty(len(features), len(rows), dtype=torch.float64)
    some = any(vector is not None for row in rows for vector in row)
    for b, feature in enumerate(features):
        for i, row in enumerate(rows):
            masked = empty == "mask" and some and all(vector is None for vector in row)
            scores[b, i] = -math.inf if masked else float(feature / feature.norm() @ prototypes[b, i])
    return scores


def reference_alignment_map(tokens, texts, grid):
    """Cosines with the text of each image, of the patches ``[batch, rows, columns]``, and the token of the highest."""
    rows, columns = grid
    cosines = torch.zeros(len(tokens), rows, columns)
    winner = []
    for b, (own, text) in enumerate(zip(tokens, texts)):
        best = None
        for index, token in enumerate(own):
            cosine = float(token @ text / token.norm() / text.norm())
            prefix = len(own) - rows * columns
            if index >= prefix:
                cosines[b, (index - prefix) // columns, (index - prefix) % columns] = cosine
            if best is None or cosine > best[0]:
                best = (cosine, index)
        winner.append(best[1])
    return cosines, torch.tensor(winner)


def reference_cls_attention(hidden, weight, bias, num_heads):
    """What token 0 reads of each token, mean over heads ``[batch, tokens]``, by the fused matrix of q, k and v."""
    batch, tokens, dim = hidden.shape
    size = dim // num_heads
    shares = torch.zeros(batch, tokens)
    for b in range(batch):
        query, key, _ = (hidden[b] @ weight.T + bias).split(dim, dim=1)
        for head in range(num_heads):
            own = slice(head * size, (head + 1) * size)
            exponents = [math.exp(float(query[0, own] @ key[token, own]) / math.sqrt(size)) for token in range(tokens)]
            for token, exponent in enumerate(exponents):
                shares[b, token] += exponent / sum(exponents) / num_heads
    return shares


def reference_pointing(maps, masks):
    """How many of the maps have their highest patch centred in their mask."""
    hits = 0
    for patches, mask in zip(maps.tolist(), masks.tolist()):
        best = max((value, -row, -column) for row, line in enumerate(patches) for column, value in enumerate(line))
        row, column = -best[1], -best[2]
        y = math.floor((row + 0.5) * len(mask) / len(patches))
        x = math.floor((column + 0.5) * len(mask[0]) / len(patches[0]))
        hits += mask[y][x]
    return hits


def reference_feasibility(attr_vectors, obj_vectors, seen):
    """Pair by pair: the closest seen object of the attribute, the closest seen attribute of the object."""

    def cosine(one, other):
        return float(one @ other / (one.norm() * other.norm()))

    table = torch.zeros(len(attr_vectors), len(obj_vectors), dtype=torch.float64)
    attrs, objs = attr_vectors.double(), obj_vectors.double()
    for a in range(len(attrs)):
        for o in range(len(objs)):
            if not seen[a, o]:
                by_obj = [cosine(objs[o], objs[other]) for other in range(len(objs)) if seen[a, other]]
                by_attr = [cosine(attrs[a], attrs[other]) for other in range(len(attrs)) if seen[other, o]]
                table[a, o] = (max([-1.0, *by_obj]) + max([-1.0, *by_attr])) / 2
    return table


def reference_masked_scores(scores, feasibility, seen_mask, threshold, masking):
    """Score by score."""
    masked, threshold = scores.clone(), torch.tensor(threshold).item()  # float32 as the ratings
    for column, (rating, seen) in enumerate(zip(feasibility.tolist(), seen_mask.tolist())):
        kept = (0.0 if seen else rating) >= threshold
        for sample in range(len(scores)):
            if masking == "clean" and not seen and not kept:
                masked[sample, column] = -math.inf
            if masking == "official" and scores[sample, column] > -math.inf:
                masked[sample, column] *= int(kept) + int(seen)
    return masked


def reference_threshold_search(
    scores, target, pair_attr, pair_obj, seen_mask, eval_mask=None, *, feasibility, masking, steps, topk=1
):
    """The literal search: thresholds, the area at each from the full evaluation of masked scores, and the best."""
    ratings = [rating for rating, seen in zip(feasibility.tolist(), seen_mask.tolist()) if not seen]
    thresholds = np.linspace(min(ratings), max(ratings), steps).astype(np.float32).tolist()
    areas, best, threshold = [], 0.0, -10.0
    for tried in thresholds:
        masked = reference_masked_scores(scores, feasibility, seen_mask, tried, masking)
        areas.append(reference_czsl_scores(masked, target, pair_attr, pair_obj, seen_mask, eval_mask, topk=topk)["auc"])
        if areas[-1] > best:
            best, threshold = areas[-1], tried
    return thresholds, areas, threshold


def reference_score_statistics(scores, target, pairs, bucket=None, *, num_buckets=1, topk=1):
    """Sample by sample and column by column; the fields of ``ScoreStatistics``, in that order."""

    def largest(scores, k):
        return [*sorted(scores, reverse=True), *[-math.inf] * k][:k]

    attr, obj, seen, candidates = (part.tolist() for part in pairs)
    bucket = [0] * len(seen) if bucket is None else bucket.tolist()
    negatives, best_seen, primitives = [], [], []
    for row, true in zip(scores.tolist(), target.tolist()):
        others = [column for column in range(len(row)) if candidates[column] and column != true]
        groups = [[column for column in others if seen[column]]]
        groups += [[c for c in others if not seen[c] and bucket[c] == number] for number in range(num_buckets)]
        sides = [[c for c in group if (c < true) == before] for group in groups for before in (True, False)]
        negatives.append([largest([row[column] for column in side], topk) for side in sides])
        best_seen.append(largest([score for score, is_seen in zip(row, seen) if is_seen], topk)[-1])
        right = []
        for bias in (0.0, 1e3):
            biased = [float(torch.tensor(score) + bias * (not is_seen)) for score, is_seen in zip(row, seen)]
            finite = [column for column in sorted([*others, true]) if biased[column] > -math.inf]
            top = sorted(finite, key=lambda column: -biased[column])[:topk]
            right.append([any(names[column] == names[true] for column in top) for names in (attr, obj)])
        primitives.append(right)
    own = scores[torch.arange(len(scores)), target]
    return target, own, torch.tensor(negatives), torch.tensor(best_seen), torch.tensor(primitives)
