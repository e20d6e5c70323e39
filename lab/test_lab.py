"""
What must stay true of the study, its claims and its controls. On the CPU, without downloads:

    python -m pytest -q lab/test_lab.py
"""
import dataclasses
import json
import os
import re
import signal

import filelock
import numpy as np
import pytest
import torch

import rlvr
import train
from lab import bench, claims, controls, figures, plan, study
from rewards import Problem
from rlvr import Dataset

HERE = claims.HERE
os.chdir(HERE)
SHORT = ("--preset tiny --steps 3 --batch 12 --micro_batch 12 --val 12 --test 24 --eval_every 3 "
         "--words_steps 8 --device cpu").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on the embedded pool, soft with stage 0 and single without: {way: folder}."""
    folder = tmp_path_factory.mktemp("runs")
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N_MUSKETEERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        train.run([*SHORT, "--reading_steps", "4", "--out", str(folder / "soft")])
        train.run([*SHORT, "--router", "none", "--out", str(folder / "single")])
        yield {"soft": folder / "soft", "single": folder / "single"}
    for number, handler in handlers.items():  # train.py sets its own
        signal.signal(number, handler)


# -- Statistics

@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover(seeds):
    """With few seeds that differ, the interval holds the truth about as often as it says."""
    generator = np.random.default_rng(seeds)
    n_covered = 0
    for _ in range(400):
        D = generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=(1, 20))
        low, high = claims.interval(D, draws=2000)
        if low <= 0 <= high:
            n_covered += 1
    assert 0.93 <= n_covered / 400 <= 0.99


def test_statistics_by_hand():
    # A share of one half, of 400 items: 0.5 -+ 1.96 * 0.5 / sqrt(400).
    low, high = claims.interval([0, 1] * 200)
    assert low == pytest.approx(0.451, abs=0.004)
    assert high == pytest.approx(0.549, abs=0.004)

    # A tie; the number is that of scipy.
    assert claims.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert claims.spearman([1, 2], [5, 5]) is None

    t = np.arange(9.0)
    assert abs(claims.without_trend(t, 3 * t - 2)).max() == 0


def test_drift_alone_is_no_relation():
    generator = np.random.default_rng(0)
    t = np.linspace(0, 1, 300)
    x = t + 0.1 * generator.normal(size=300)
    y = -np.sqrt(t) + 0.1 * generator.normal(size=300)
    assert claims.spearman(x, y) < -0.7
    assert abs(claims.spearman_without_trend(range(300), x, y, 1)) < 0.2


@pytest.mark.parametrize("low, high, more, same, no_less", [
    (1, 9, "confirmed", "refuted", "confirmed"),
    (-9, -1, "refuted", "refuted", "refuted"),
    (-2, 2, "refuted", "confirmed", "confirmed"),
    (-9, 9, "open", "open", "open"),
    (-4, 9, "open", "open", "confirmed"),
    (1, 4, "confirmed", "confirmed", "confirmed"),
])
def test_a_verdict_is_its_interval(low, high, more, same, no_less):
    assert claims.judge(low, high, 5, "more") == more
    assert claims.judge(low, high, 5, "same") == same
    assert claims.judge(low, high, 5, "no less") == no_less


# -- Claims

def rows_of(task, way, share, seeds=3, n=200, **more):
    """Invented rows of a way that is right in this share of the problems."""
    right = [int(i < share * n) for i in range(n)]
    experts = [dict(name=name) for name in ("arithmetic", "logic", "algorithmic")]
    row = dict(task=task, way=way, after=share, before=0.1, n=n, trainable=1, seconds=1.0, right=right,
               commit="abc", curve=[], experts=experts, datasets=["chain_sum"] * n)
    return [row | dict(seed=seed) | more for seed in range(seeds)]


def verdicts(rows):
    """{number of the claim: verdict}"""
    found = {}
    for number, (_, parts_of) in enumerate(claims.CLAIMS, start=1):
        found[number], _ = claims.verdict(parts_of(rows))
    return found


def test_claims_are_judged_by_their_intervals():
    rows = [*rows_of("sums", "soft", 0.6), *rows_of("sums", "single", 0.3), *rows_of("sums", "prefix", 0.6),
            *rows_of("mix", "soft", 0.6, attended=[[0.8, 0.1, 0.1]] * 200), *rows_of("mix", "prefix", 0.3),
            *rows_of("sums", "soft shuffled", 0.6, seeds=1), *rows_of("mix", "soft first", 0.61),
            *rows_of("family", "single", 0.95), *rows_of("family", "soft", 0.99)]
    found = verdicts(rows)
    assert [found[i] for i in (1, 2, 3, 4, 5)] == ["confirmed", "refuted", "open", "confirmed", "refuted"]
    assert found[9] == "confirmed"
    for number in (6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18):
        assert found[number] == "open", number
    assert "| sums | soft | 0, 1, 2 | 200 | 10.0 ± 0.0 | 60.0 ± 0.0 | +30.0 [" in claims.report(rows)


def test_without_rows_every_claim_is_open():
    assert set(verdicts([]).values()) == {"open"}
    assert claims.report([]) == "No runs yet."


def shares_of(specialist):
    """Attention by dataset in which the specialist of sums has this share."""
    rest = (1 - specialist) / 2
    return {"chain_sum": dict(arithmetic=specialist, logic=rest, algorithmic=rest)}


def ablation(n_right):
    """An ablation of 200 problems: 120 are right as trained, and n_right with shuffled states."""
    trained = [int(i < 120) for i in range(200)]
    shuffled = [int(i < n_right) for i in range(200)]
    return dict(right=trained, kinds=dict(shuffle=dict(right=shuffled)))


def test_claims_about_reading():
    """Stage 0 alone, real models, and who knows: each verdict turns with the rows that it is about."""
    knows = dict(attended=[[0.8, 0.1, 0.1]] * 200, knows=[[1, 0, 0], [1, 1, 0]] * 100)
    rows = [*rows_of("mix", "soft", 0.6, attention_by_dataset=shares_of(0.9), **knows),
            *rows_of("mix", "stage 0", 0.4, attention_by_dataset=shares_of(0.35)),
            *rows_of("real sums", "soft", 0.6, ablate=ablation(60), **knows),
            *rows_of("real mix", "soft", 0.6, attended=[[0.8, 0.2]] * 200),
            *rows_of("real mix", "stage 0", 0.3)]
    for way in ("single", "prefix", "soft shuffled"):
        rows += rows_of("real sums", way, 0.3)
    found = verdicts(rows)
    assert [found[i] for i in (11, 12, 13, 15)] == ["confirmed"] * 4

    for row in rows:
        row["attended"] = [[0.1, 0.8, 0.1]] * 200  # the one that does not know
        if row["task"] == "real mix":
            row["attended"] = [[0.3, 0.7]] * 200
        if row["way"] == "stage 0":
            row["attention_by_dataset"] = shares_of(0.9)
        if "ablate" in row:
            row["ablate"] = ablation(120)  # shuffling costs nothing
    found = verdicts(rows)
    assert [found[i] for i in (11, 12, 13, 15)] == ["refuted"] * 4


def test_one_specialist_that_is_not_found_refutes_claim_16():
    """It takes ten seeds to confirm it."""
    rows = rows_of("mix", "soft", 0.6, seeds=10, attention_by_dataset=shares_of(0.9))
    assert verdicts(rows)[16] == "confirmed"
    assert verdicts(rows[:9])[16] == "open"
    rows[3]["attention_by_dataset"] = shares_of(0.45)
    assert verdicts(rows)[16] == "refuted"


def test_one_expert_that_soft_does_not_pass_refutes_claim_17():
    """The experts are right in 50 and 50 of 100 problems, together in all of them; soft in 90."""
    first = [[1, 0]] * 50 + [[0, 1]] * 50
    rows = rows_of("real family", "soft", 0.9, n=100, knows=first, experts=[dict(name="a"), dict(name="b")])
    assert verdicts(rows)[17] == "confirmed"
    for row in rows:
        row["knows"] = [[1, 0]] * 95 + [[0, 1]] * 5
    assert verdicts(rows)[17] == "refuted"


def test_claim_18_compares_soft_with_single_on_gsm8k():
    rows = [*rows_of("gsm8k", "soft", 0.4), *rows_of("gsm8k", "single", 0.3)]
    assert verdicts(rows)[18] == "confirmed"


def test_tables_about_who_knows():
    """Two experts, each right in half of the problems; soft in 90%, so it closes 80% of what is between."""
    numbers = dict(knows=[[1, 0]] * 50 + [[0, 1]] * 50, experts=[dict(name="a"), dict(name="b")],
                   by_dataset=dict(chain_sum=dict(n=100, before=0.1, after=0.9)),
                   masked=dict(a=dict(chain_sum=0.5), b=dict(chain_sum=0.6)),
                   attention_by_dataset=dict(chain_sum=dict(a=0.7, b=0.3)), datasets=["chain_sum"] * 100)
    rows = rows_of("real family", "soft", 0.9, n=100, **numbers)
    rows[1] = rows[1] | dict(attention_by_dataset=dict(chain_sum=dict(a=0.9, b=0.1)))
    assert claims.together_table(rows)[-1] == "| real family | soft | 10.0 | 50.0 | 100.0 | 90.0 | 80% |"
    of_a = claims.experts_table(rows)[2]
    assert of_a == "| real family | soft | chain_sum | 100 | a | 50 | 77 (70 to 90) | 40 |"


def test_the_history_can_be_read_and_its_verdicts_are_what_they_were():
    """212 runs of the program before experts were compared."""
    rows = claims.finished(history="3d87713")
    assert len(rows) == 212
    for row in rows:
        assert sum(row["right"]) / row["n"] == pytest.approx(row["after"]), row["id"]
    found = verdicts(rows)
    assert [number for number in range(1, 16) if found[number] == "open"] == [5, 7]
    assert [number for number in range(1, 16) if found[number] == "refuted"] == [4, 8]
    with pytest.raises(ValueError, match="is not there"):
        claims.finished(history="0000000")


# -- Controls

def some_problems():
    """Six problems: three sums, two of family, one of primes. next_in_dataset gives [2, 4, 5, 3, 1, 0]."""
    datasets = ["chain_sum", "family", "chain_sum", "primes", "family", "chain_sum"]
    return [Problem(f"question {i}", f"answer {i}", dataset=name) for i, name in enumerate(datasets)]


def controlled(name):
    """Which problem's states and text each expert has, [experts][6], with a control of the study.

    Two experts; the first has two states, the second one.
    """
    H = torch.arange(6.0)[:, None, None].expand(6, 3, 4)
    texts = [[f"expert {e} says {i}" for i in range(6)] for e in range(2)]
    of_expert = torch.tensor([0, 0, 1])
    new_H, new_texts = rlvr.CONTROLS[name](H, texts, some_problems(), of_expert, 0)

    found = []
    for e in range(2):
        numbers = new_H[:, of_expert == e]
        assert (numbers == numbers[:, :1, :1]).all()
        of_states = [int(number) for number in numbers[:, 0, 0]]
        of_texts = [int(text.removeprefix(f"expert {e} says ")) for text in new_texts[e]]
        assert of_states == of_texts  # states and texts change together
        found.append(of_states)

    assert torch.equal(H, torch.arange(6.0)[:, None, None].expand(6, 3, 4))  # what was given is unchanged
    assert texts[1] == [f"expert 1 says {i}" for i in range(6)]
    return found


def test_the_last_expert_answers_the_next_problem_of_its_dataset():
    first, last = controlled("last_wrong")
    assert first == [0, 1, 2, 3, 4, 5]
    assert last == [2, 4, 5, 3, 1, 0]  # primes has one problem, which has no other


def test_the_last_expert_is_wrong_on_the_last_dataset_by_name():
    first, last = controlled("last_partly_wrong")
    assert last == [0, 1, 2, 3, 4, 5]  # the last dataset, primes, has no second problem
    problems = [problem for problem in some_problems() if problem.dataset != "primes"]
    H = torch.arange(5.0)[:, None, None].expand(5, 2, 1)
    new_H, _ = controls.last_partly_wrong(H, [], problems, torch.tensor([0, 1]), 0)
    assert new_H[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert new_H[:, 1, 0].tolist() == [0, 3, 2, 1, 4]


def test_each_expert_knows_one_dataset():
    first, second = controlled("each_knows_one")
    assert first == [0, 4, 2, 3, 1, 5]  # wrong on family, the second dataset by name
    assert second == [2, 1, 5, 3, 4, 0]  # wrong on chain_sum, the first one
    with pytest.raises(ValueError, match="two experts"):
        controls.each_knows_one(torch.zeros(6, 1, 4), [], some_problems(), torch.tensor([0]), 0)


def test_a_run_with_a_control_of_the_study_has_wrong_states_and_texts(tmp_path):
    """Through --extension, on the embedded pool: the copy of arithmetic has the next problem's states."""
    out = tmp_path / "run"
    words = "--extension lab/controls.py --control last_wrong --task arithmetic --experts tiny/arithmetic " \
            "tiny/arithmetic"
    args = train.parse_args([*SHORT, *words.split(), "--out", str(out)])
    assert args.extension == "lab/controls.py"
    policy, experts, _ = rlvr.build(args)
    dataset = Dataset(rlvr.load_problems(args, "test", 8), policy, experts, args, progress=False)
    assert torch.equal(dataset.H[:-1, 1], dataset.H[1:, 0])
    assert dataset.texts[1] == [*dataset.texts[0][1:], dataset.texts[0][0]]
    assert [expert.name for expert in experts] == ["arithmetic", "arithmetic-1"]


# -- The study

def test_every_command_is_one_that_train_takes(tmp_path):
    """A gain counts only against the same stage 0, so single and prefix have as many steps of it as soft."""
    reading_steps, routers = {}, {}
    for run in study.runs_in(study.BLOCKS):
        if run.is_stage0:
            continue
        words = study.command(run)[2:]
        args = train.parse_args([*words, "--device", "cpu", "--out", str(tmp_path / "x")])
        assert args.seed == run.seed
        reading_steps[run.task, run.way] = args.reading_steps
        routers[run.way.split()[0]] = args.router
    assert routers == dict(soft="attention", single="none", prefix="constant", hard="hard", linear="linear",
                           text="text")
    for (task, way), steps in reading_steps.items():
        expected = reading_steps["mix" if task == "rates" else task, "soft"]
        assert expected > 0
        if way.endswith("without stage 0") or way.startswith("text"):
            expected = 0
        assert steps == expected, (task, way)


def test_ids_are_unique_and_quick_is_a_part_of_the_rest():
    embedded = [run.id for run in study.runs_in(study.EMBEDDED)]
    real = [run.id for run in study.runs_in(study.REAL_BLOCKS)]
    assert len(set(embedded + real)) == len(embedded + real)
    assert {run.id for run in study.runs_in(study.QUICK)} < set(embedded)

    # Two blocks with the same run give it once, and the list without options has the real runs, too.
    assert len(study.runs_in(["mix", "quick", "mix"])) == len(study.runs_in(["mix", "quick"]))
    listed = {run.id for run in study.chosen_runs(study.parse(["--list"]))}
    assert listed == set(embedded + real)


def test_stage_0_is_tested_on_as_many_problems_as_soft():
    """eval.py alone would take all of GSM8K, and rows of 1,319 and of 512 problems cannot be paired."""
    for run in study.runs_in(study.BLOCKS):
        if run.is_stage0:
            n = study.command(run)[-1]
            assert f"--test {n} " in f"{study.TASKS[run.task]} ", run.id


def test_real_models_that_are_not_there_are_named(tmp_path):
    (tmp_path / study.REAL_POLICY).mkdir()
    with pytest.raises(ValueError, match="--real FOLDER"):
        study.run(["--only", "real sums"])
    with pytest.raises(ValueError, match="lacks all-minilm-l6-v2, qwen2.5-coder-0.5b-instruct:"):
        study.run(["--real", str(tmp_path), "--only", "real sums"])


# In place of train.py, eval.py and lab/probe.py: they copy a finished run, fail, or stop.
FAKE_TRAIN = """import shutil, sys
from pathlib import Path
words = sys.argv
out = Path(words[words.index("--out") + 1] if "--out" in words else words[words.index("--resume") + 1])
with open("calls", "a") as file:
    print(*words, file=file)
if "prefix" in out.name:
    sys.exit("the disk is full")
if "single" in out.name and "--resume" not in words:
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    sys.exit(0)  # as after Ctrl-C
shutil.copytree({finished!r}, out, dirs_exist_ok=True)
"""
FAKE_PROBE = """import json, sys
n = 24
right = [0] * n
datasets = ["chain_sum", "family_relationships", "count_primes"] * 8
json.dump(dict(right=right, kinds=dict(static=dict(right=right)), datasets=datasets,
               attended=[[1, 0, 0]] * n, knows=[[1, 0, 0]] * n), open(sys.argv[1] + "/ablate.json", "w"))
"""
FAKE_EVAL = """import shutil, sys
shutil.copy(sys.argv[1] + "/eval.json", sys.argv[1] + "/eval-stage0-n24.json")
"""


@pytest.fixture
def fake_study(runs, tmp_path, monkeypatch):
    """A folder with fake programs, in which the study works, with four runs in the block `quick`."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    (tmp_path / "lab" / "probe.py").write_text(FAKE_PROBE)
    (tmp_path / "eval.py").write_text(FAKE_EVAL)
    (tmp_path / "train.py").write_text(FAKE_TRAIN.replace("{finished!r}", repr(str(runs["soft"]))))
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs" / "study")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(study.BLOCKS, "quick", [(["mix"], ["soft", "single", "prefix", "stage 0"], [0])])
    return tmp_path


def rows_by_id(results):
    return {row["id"]: row for row in claims.read_rows(results / "study.jsonl")}


def test_the_study_continues_where_it_was(fake_study, runs, capsys):
    """A finished run gets a row and a curve, a failed one a row with the reason, a stopped one none.

    Whatever has a row is not run again, and a stopped run continues.
    """
    results, quick = fake_study / "results", ["--only", "quick"]

    def calls():
        return (fake_study / "calls").read_text().splitlines()

    # The first time: soft is finished, prefix fails, single is stopped, soft's stage 0 is tested.
    with pytest.raises(ValueError, match="1 runs failed"):
        study.run(quick)
    rows = rows_by_id(results)
    assert set(rows) == {"mix-soft-s0", "mix-prefix-s0", "mix-stage-0-s0"}
    assert len(calls()) == 3
    assert rows["mix-prefix-s0"]["after"] is None
    assert "the disk is full" in rows["mix-prefix-s0"]["reason"]

    # The second time single continues; the third time nothing is left to do.
    study.run(quick)
    assert calls()[3:] == ["train.py --resume runs/study/mix-single-s0"]
    study.run(quick)
    assert len(calls()) == 4

    # What the rows and curves hold.
    row, report = rows_by_id(results)["mix-soft-s0"], json.loads((runs["soft"] / "eval.json").read_text())
    assert row["after"] == report["after"]["strict"]
    assert row["n"] == 24
    assert row["reading_steps"] == 4
    assert row["commit"] is None  # the folder of this test is no repository
    assert str(fake_study) not in json.dumps(row)
    assert "--seed 0" in row["command"]
    _, policy, _, router = rlvr.open_run(runs["soft"], "cpu")
    assert row["trainable"] == train.count(policy) + train.count(router)

    (soft,) = claims.runs_of(claims.finished(results), "mix", "soft")
    assert len(soft["curve"]) == 3
    assert "val" in soft["curve"][-1]
    assert "reward_by_expert" in soft["curve"][0]
    assert soft["attended"]
    assert [expert["name"] for expert in soft["experts"]] == ["arithmetic", "logic", "algorithmic"]
    assert set(soft["read_back"]) == {"arithmetic", "logic", "algorithmic"}

    # Pictures can be drawn from them, and the list says what is done.
    names = {path.name for path in figures.draw_all(results)}
    assert names >= {"learning.png", "attention.png", "ablations.png"}
    capsys.readouterr()
    study.run([*quick, "--list"])
    assert capsys.readouterr().out.count("done ") == 3


def test_a_second_study_is_refused_and_a_run_at_work_is_left_alone(fake_study, capsys):
    study.RUNS.mkdir(parents=True)
    with filelock.FileLock(study.RUNS / "lock"):
        with pytest.raises(ValueError, match="another study is at work"):
            study.run(["--only", "quick"])

    # A process that an earlier study left behind still trains soft.
    soft = study.RUNS / "mix-soft-s0"
    soft.mkdir()
    with filelock.FileLock(soft / "lock"):
        with pytest.raises(ValueError, match="1 runs failed"):  # prefix
            study.run(["--only", "quick"])
    assert "mix-soft-s0" not in rows_by_id(study.RESULTS)
    assert "still at work" in capsys.readouterr().out


def test_a_torn_line_costs_no_other_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b", "af')
    study.Study([], "models", 1).append(path, dict(id="c", value=float("nan")))
    assert rlvr.read_records(path) == [dict(id="a"), dict(id="c", value=None)]


def test_points_of_a_curve_are_means():
    metrics = [dict(step=i, reward=float(i), kl=None, attention={"a": i / 8}) for i in range(1, 9)]
    metrics[3]["val"] = 0.25
    metrics[2]["reward"] = None  # it was NaN
    first, second = study.condense(metrics, 2)
    assert first == dict(step=4, reward=2.3333, kl=None, val=0.25, attention={"a": 0.3125})
    assert second["reward"] == 6.5


def test_no_text_names_an_option_that_does_not_exist():
    """In README, PAPER.md and SCALE.md, and in the docstrings and messages of the programs."""
    known = {f"--{field.name}" for field in dataclasses.fields(train.Args)}
    programs = [path for path in (*HERE.glob("*.py"), *HERE.glob("lab/*.py")) if "test_" not in path.name]
    for path in programs:
        known |= set(re.findall(r'add_argument\("(--\w+)"', path.read_text()))

    # Options of torchrun, pip and git, and one that every program has.
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--index", "--short",
              "--porcelain", "--help"}
    pages = [HERE / "README.md", HERE / "lab/README.md"]
    pages += [claims.RESULTS / "PAPER.md", claims.RESULTS / "SCALE.md"]
    for path in (*programs, *pages):
        named = set(re.findall(r"(?<![\w-])--[a-z]\w*", path.read_text()))
        assert named <= known, path


def test_rows_belong_to_a_commit_and_agree_with_study_and_readme():
    rows = claims.finished()
    if not rows:
        pytest.skip("the study has no rows yet")
    for row in rows:
        assert sum(row["right"]) / row["n"] == pytest.approx(row["after"]), row["id"]
        assert row["commit"], row["id"]
        assert row["command"], row["id"]

    text = (claims.RESULTS / "STUDY.md").read_text()
    assert claims.with_report(text, study.make_report()) == text, "call python -m lab.study --report"

    # The README's table.
    readme = (HERE / "README.md").read_text()
    cells = [("mix", way) for way in ("soft", "single", "prefix", "soft shuffled", "soft noise",
                                      "soft untrained", "soft without comparing", "soft without stage 0",
                                      "linear", "text")]
    cells += [(task, "soft") for task in ("real family", "real copies", "real terms", "real pool", "gsm8k")]
    for task, way in cells:
        after = [row["after"] for row in claims.runs_of(rows, task, way)]
        if after:
            assert f"{claims.mean_and_std(after)} ({len(after)})" in readme, (task, way)

    # What the best expert knows, in its table of real models.
    for task in ("real family", "real copies", "real pool", "gsm8k"):
        runs = claims.runs_of(rows, task, "soft")
        if runs:
            best = np.mean([row["knows"] for row in runs], axis=(0, 1)).max()
            after = claims.mean_and_std([row["after"] for row in runs])
            [line] = [line for line in readme.splitlines() if f"| {after} (" in line]
            assert f"| {100 * best:.0f} |" in line, task


def test_the_readmes_table_of_gpus_is_that_of_the_program():
    sizes = [f"{size / 1e9:.1f}" for preset, _, size in plan.print_rows() if preset == "small"]
    assert f"| must be free, GB | {' | '.join(sizes)} |" in (HERE / "README.md").read_text()


def test_speed_is_the_report_of_its_figures():
    figures_of_speed = json.loads((claims.RESULTS / "speed.json").read_text())
    page = (claims.RESULTS / "SPEED.md").read_text()
    assert claims.with_report(page, bench.report(figures_of_speed)) == page


def test_a_report_without_its_markers_is_refused():
    text = f"# The study\n{claims.BEGIN}old{claims.END}\nmore"
    assert claims.with_report(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="program: end"):
        claims.with_report(text.replace(claims.END, ""), "")


@pytest.mark.parametrize("page", ["README.md", "results/STUDY.md", "results/SCALE.md"])
def test_links_lead_somewhere(page):
    path = HERE / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"
