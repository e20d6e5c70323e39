"""
Which claims hold: verdicts, with their intervals, from the study's rows and curves alone.

A row here is a line of results/study.jsonl with the keys of its curve file. What would refute a claim stands
in `judge`, MARGIN and CLAIMS, and was written before the study was made; how intervals are made (`stats`)
was corrected during it, see results/LOG.md. Each is a 95% one by itself: of twenty differences that are
nothing, about one will seem something.
"""
import math

import numpy as np

from stats import detectable, interval, together

SPECIALIST = dict(chain_sum="arithmetic", family_relationships="logic", count_primes="algorithmic")


# -- claims
MARGIN = dict(points=5.0, nats=0.05, rho=0.1)  # smaller than this is no difference


def judge(low, high, margin, same):
    """What is claimed to be more than 0 is confirmed by an interval above 0, refuted by one below 0 or within
    the margin. What is claimed to be the `same` is confirmed within the margin, else refuted without 0."""
    within = max(-low, high) <= margin
    if same:
        return "confirmed" if within else "refuted" if low > 0 or high < 0 else "open"
    return "confirmed" if low > 0 else "refuted" if high < 0 or within else "open"


def measured(what, a, b=0.0, unit="points", same=False):
    """(verdict, sentence) on a - b, each (runs, items); it takes two runs to say anything about a way."""
    if len(a) < 2:
        return "open", f"{what}: not measured on two runs"
    D = np.asarray(a, float) - np.asarray(b, float)
    return judge(*interval(D), MARGIN[unit], same), f"{what}: {shown(D, unit)}, {len(D)} runs"


def shown(D, unit="points"):
    fmt, (low, high) = "+.1f" if unit == "points" else "+.2f", interval(D)
    return f"{np.mean(D):{fmt}} [{low:{fmt}}, {high:{fmt}}] {unit}"


def runs_of(rows, task, way):
    return {r["seed"]: r for r in rows if (r["task"], r["way"]) == (task, way)}


def paired(rows, task, a, b):
    """Right or wrong, in points, of two ways on the seeds that both have: two of (seeds, items)."""
    a, b = runs_of(rows, task, a), runs_of(rows, task, b)
    return [100 * np.array([of[s]["right"] for s in sorted(a.keys() & b.keys())]) for of in (a, b)]


def minus(rows, a, b, *tasks, same=False):
    return [measured(f"{task}, {a} - {b}", *paired(rows, task, a, b), same=same) for task in tasks]


def saturated(rows):
    """Single against soft on every task where single is right in 90% or more after training."""
    tasks = sorted({r["task"] for r in rows})
    after = {t: np.mean([r["after"] for r in runs_of(rows, t, "single").values()] or [0]) for t in tasks}
    parts = minus(rows, "single", "soft", *(t for t in tasks if after[t] >= 0.9))
    return parts or [("open", f"single saturates nowhere, at most {max(after.values(), default=0):.0%}")] + [
        ("open", said) for _, said in minus(rows, "single", "soft", "logic", "algorithmic")]


def falling(rows):
    """Less than no correlation, so its opposite is claimed to be above 0."""
    keys = ("step", "attention_entropy", "reward")
    found = [together(*([p[key] for p in r["curve"]] for key in keys)) for r in rows
             if r["way"] == "soft" and r["pool"] == "tiny" and len(r["curve"]) > 2]
    mean = lambda key: np.mean([x[key] or 0.0 for x in found] or [0])
    return [measured(f"Spearman's rho over 50 points of a run {mean('rho'):+.2f}, with a cubic trend out "
                     f"{mean('cubic'):+.2f}; a straight one out and the sign turned",
                     [[-(x["detrended"] or 0.0)] for x in found], unit="rho")]


def concentrated(rows):
    easy, hard = (runs_of(rows, t, "soft") for t in ("arithmetic", "arithmetic hard"))
    end = lambda r: [np.mean([p["attention_entropy"] for p in r["curve"][-5:]])]  # the last tenth
    a, b = ([end(of[s]) for s in sorted(easy.keys() & hard.keys())] for of in (easy, hard))
    return [measured("entropy at the end, arithmetic - arithmetic hard", np.array(a), np.array(b), "nats")]


def heard(rows, task, way, what, pick):
    """pick(attention by item and expert, its run, names) against an even share of the experts."""
    some = list(runs_of(rows, task, way).values())
    names = [e["name"] for e in some[0]["experts"]] if some else [""]
    values = [100.0 * pick(np.array(r["heard"]), r, names) for r in some]
    return [measured(f"{what} - {100 / len(names):.0f}", values, 100 / len(names))]


def agrees(attention, run, names):
    return attention.argmax(-1) == [names.index(SPECIALIST[d]) for d in run["datasets"]]


def static(rows, task, same):
    """What the run loses with its mean attention (eval.py RUN --ablate static)."""
    some = [r["ablate"] for r in runs_of(rows, task, "soft").values() if "ablate" in r]
    a, b = [x["right"] for x in some], [x["kinds"]["static"]["right"] for x in some]
    return [measured(f"{task}, as trained - static", 100 * np.array(a), 100 * np.array(b), same=same)]


CLAIMS = (  # all parts must hold, and one that is refuted refutes
    ("Soft beats single on arithmetic", lambda rows: minus(rows, "soft", "single", "arithmetic")),
    ("It beats a learned constant prefix", lambda rows: minus(rows, "soft", "prefix", "arithmetic", "mix")),
    ("It beats shuffled states, noise and untrained experts",
     lambda rows: minus(rows, "soft", "soft shuffled", "arithmetic", "mix")
     + minus(rows, "soft", "soft noise", "mix") + minus(rows, "soft", "soft untrained", "mix")),
    ("The first token's state does as well as the last's",
     lambda rows: minus(rows, "soft first", "soft", "arithmetic", "mix", same=True)),
    ("Single wins where the task saturates (single at 90% or more)", saturated),
    ("Attention's entropy falls as reward rises, a straight trend removed", falling),
    ("Attention concentrates more on harder tasks", concentrated),
    ("Larger experts are preferred whatever they know (a wide one with random weights)",
     lambda rows: heard(rows, "arithmetic", "soft wide", "its share",
                        lambda attention, run, names: attention[:, names.index("wide")])),
    ("On the mix the router's choice agrees with who could have solved it (see tiny/README.md)",
     lambda rows: heard(rows, "mix", "soft", "it is heard most", agrees)),
    ("Static attention suffices on easy arithmetic and not on the mix",
     lambda rows: static(rows, "arithmetic", True) + static(rows, "mix", False)))


def verdict(parts):
    verdicts, sentences = zip(*parts)
    return next((v for v in ("refuted", "open") if v in verdicts), "confirmed"), "; ".join(sentences)


# -- what is reported
def pilot_sd(rows):
    """Deviation over seeds in points, pooled over the pilot's groups of two, and of the group that varies
    most; None before it is done."""
    groups = [[100 * r["after"] for s, r in runs_of(rows, t, w).items() if s < 2]
              for t in ("arithmetic", "mix") for w in ("soft", "single")]
    if min(map(len, groups)) > 1:
        variances = [np.var(g, ddof=1) for g in groups]
        return math.sqrt(np.mean(variances)), math.sqrt(max(variances))


def listening(rows):
    """Beyond the claims: when a sum goes wrong, was the wrong expert heard, or the right one in vain?"""
    percent = lambda values: ", ".join("–" if math.isnan(v) else f"{100 * v:.0f}" for v in values)
    for task in ("arithmetic", "mix"):
        shares, found = [], ([], [])
        for _, r in sorted(runs_of(rows, task, "soft").items()):
            of = np.array(r["datasets"]) == "chain_sum"
            right = np.array(r["right"])[of]
            top = agrees(np.array(r["heard"]), r, [e["name"] for e in r["experts"]])[of]
            shares.append(top.mean())
            for values, some in zip(found, (top, ~top)):
                values.append(right[some].mean() if some.any() else math.nan)
        if shares:
            yield (f"{task}: the specialist is heard most on {percent(shares)}% of the sums (by seed); of "
                   f"these {percent(found[0])}% are right, of the others {percent(found[1])}%.")


def table(rows):
    yield "| task | collaboration | seeds | n | before | after | minus single | trained | seconds |"
    yield "|---" * 9 + "|"
    for task, way in sorted({(r["task"], r["way"]) for r in rows}):
        some = runs_of(rows, task, way)
        of = lambda k: np.array([r[k] for r in some.values()])
        spread = lambda k: f"{100 * of(k).mean():.1f}" + f" ± {100 * of(k).std():.1f}" * (len(some) > 1)
        a, b = paired(rows, task, way, "single")
        gain = shown(a - b) if way != "single" and len(a) > 1 else ""
        cells = (task, way, ", ".join(map(str, sorted(some))), of("n")[0], spread("before"), spread("after"),
                 gain, f"{of('trainable')[0]:,}", f"{of('seconds').mean():.0f}")
        yield f"| {' | '.join(map(str, cells))} |"


def report(rows):
    """Markdown: the table, what the pilot says, and the verdicts."""
    sd = pilot_sd(rows)
    text = [*table(rows), "", "Strict greedy accuracy in percent on the same held-out problems, mean and",
            "population deviation over seeds; differences paired by seed and item, 95% (items by",
            "bootstrap, seeds by Student's t)."]
    if sd is not None:
        one, two = ("{:.1f} ({:.1f})".format(*pair) for pair in (sd, map(detectable, sd)))
        text += [f"With the pilot's deviation over seeds, {one} points pooled (in the group with the most),",
                 f"five seeds find a difference of {two} points in 80% of such studies."]
    text += ["", "| claim | verdict | figure |", "|---|---|---|"]
    for i, (claim, parts) in enumerate(CLAIMS, 1):
        text.append("| ({}) {} | **{}** | {} |".format(i, claim, *verdict(parts(rows))))
    if said := list(listening(rows)):
        text += ["", "Beyond the claims, what goes wrong with the sums in soft's runs:", "",
                 *(f"- {line}" for line in said)]
    return "\n".join(text)
