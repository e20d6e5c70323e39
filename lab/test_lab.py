"""What must stay true of lab/. On the CPU, without downloads:   python -m pytest -q lab/test_lab.py"""
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "lab")]

import claims  # noqa: E402
import export  # noqa: E402
import figures  # noqa: E402
import page as page_file  # noqa: E402
import plan  # noqa: E402
import probe  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402
from rewards import next_of_dataset  # noqa: E402
from rlvr import Dataset  # noqa: E402
from router import Router  # noqa: E402

SHORT = ("--preset tiny --steps 3 --batch 12 --micro_batch 12 --val 12 --test 24 --eval_every 3 "
         "--save_every 3 --align_words 8 --device cpu").split()

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on the embedded pool, soft with stage 0 and single without: {way: folder}."""
    folder = tmp_path_factory.mktemp("runs")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N_MUSKETEERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        train.run([*SHORT, "--align", "4", "--out", str(folder / "soft")])
        train.run([*SHORT, "--collab", "single", "--out", str(folder / "single")])
        yield {"soft": folder / "soft", "single": folder / "single"}
    for number, handler in handlers.items():  # train.py sets its own
        signal.signal(number, handler)

@pytest.fixture(scope="module")
def soft(runs):
    return probe.open_run(runs["soft"], "cpu")

# -- Statistics and claims

@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover(seeds):
    """Few seeds that differ: the interval holds the truth about as often as it states."""
    generator = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        D = generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=(1, 20))
        low, high = claims.interval(D, draws=2000)
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.99

def test_statistics_by_hand():
    low, high = claims.interval([0, 1] * 200)  # a share of one half: 0.5 -+ 1.96 * 0.5 / sqrt(400)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)
    assert claims.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # a tie, as scipy
    assert claims.spearman([1, 2], [5, 5]) is None
    t = np.arange(9.0)
    assert abs(claims.without_trend(t, 3 * t - 2)).max() == 0

def test_drift_alone_is_no_relation():
    generator = np.random.default_rng(0)
    t = np.linspace(0, 1, 300)
    x, y = t + 0.1 * generator.normal(size=300), -np.sqrt(t) + 0.1 * generator.normal(size=300)
    assert claims.spearman(x, y) < -0.7
    assert abs(claims.spearman_without_trend(range(300), x, y, 1)) < 0.2

@pytest.mark.parametrize("low, high, more, same, no_less", [
    (1, 9, "confirmed", "refuted", "confirmed"), (-9, -1, "refuted", "refuted", "refuted"),
    (-2, 2, "refuted", "confirmed", "confirmed"), (-9, 9, "open", "open", "open"),
    (-4, 9, "open", "open", "confirmed"), (1, 4, "confirmed", "confirmed", "confirmed")])
def test_a_verdict_is_its_interval(low, high, more, same, no_less):
    assert [claims.judge(low, high, 5, kind) for kind in ("more", "same", "no less")] == [more, same, no_less]

def rows_of(task, way, share, seeds=3, n=200, **more):
    """Made-up rows of a way that is right in this share of the problems."""
    right = [int(i < share * n) for i in range(n)]
    experts = [dict(name=name) for name in ("arithmetic", "logic", "algorithmic")]
    row = dict(task=task, way=way, after=share, before=0.1, n=n, trainable=1, seconds=1.0, right=right,
               curve=[], experts=experts, datasets=["chain_sum"] * n)
    return [row | dict(seed=seed) | more for seed in range(seeds)]

def verdicts(rows):
    return {i: claims.verdict(parts(rows))[0] for i, (_, parts) in enumerate(claims.CLAIMS, 1)}

def test_claims_are_judged_by_their_intervals():
    rows = [*rows_of("sums", "soft", 0.6), *rows_of("sums", "single", 0.3), *rows_of("sums", "prefix", 0.6),
            *rows_of("mix", "soft", 0.6, attended=[[0.8, 0.1, 0.1]] * 200), *rows_of("mix", "prefix", 0.3),
            *rows_of("sums", "soft shuffled", 0.6, seeds=1), *rows_of("mix", "soft first", 0.61),
            *rows_of("family", "single", 0.95), *rows_of("family", "soft", 0.99)]
    found = verdicts(rows)
    assert [found[i] for i in range(1, 6)] == ["confirmed", "refuted", "open", "confirmed", "refuted"]
    assert found[9] == "confirmed" and {found[i] for i in (6, 7, 8, 10, 11, 12, 13)} == {"open"}
    assert set(verdicts([]).values()) == {"open"}
    assert "| sums | soft | 0, 1, 2 | 200 | 10.0 ± 0.0 | 60.0 ± 0.0 | +30.0 [" in claims.report(rows)

def test_claims_about_reading():
    """Stage 0 alone, real models, and who knows: each turns with the rows that it is about."""
    ablate = lambda shuffled: dict(right=[int(i < 120) for i in range(200)],
                                   kinds=dict(shuffle=dict(right=[int(i < shuffled) for i in range(200)])))
    share = lambda x: {"chain_sum": dict(arithmetic=x, logic=(1 - x) / 2, algorithmic=(1 - x) / 2)}
    knows = dict(attended=[[0.8, 0.1, 0.1]] * 200, knows=[[1, 0, 0], [1, 1, 0]] * 100)
    rows = [*rows_of("mix", "soft", 0.6, attention_by_dataset=share(0.9), **knows),
            *rows_of("mix", "stage 0", 0.4, attention_by_dataset=share(0.35)),
            *rows_of("real sums", "soft", 0.6, ablate=ablate(60), **knows),
            *rows_of("real mix", "soft", 0.6, attended=[[0.8, 0.2]] * 200),
            *rows_of("real mix", "stage 0", 0.3),
            *(row for way in ("single", "prefix", "soft shuffled") for row in rows_of("real sums", way, 0.3))]
    assert [verdicts(rows)[i] for i in (11, 12, 13, 15)] == ["confirmed"] * 4
    for row in rows:
        row["attended"] = [[0.1, 0.8, 0.1]] * 200  # the one that does not know
        if row["task"] == "real mix":
            row["attended"] = [[0.3, 0.7]] * 200
        if row["way"] == "stage 0":
            row["attention_by_dataset"] = share(0.9)
        if "ablate" in row:
            row["ablate"] = ablate(120)  # shuffling costs nothing
    assert [verdicts(rows)[i] for i in (11, 12, 13, 15)] == ["refuted"] * 4

# -- The study

def test_every_command_of_the_plan_is_one_that_train_takes(tmp_path):
    runs = [run for block in study.BLOCKS for run in study.plan(block)]
    assert {run.id for run in study.plan("quick")} < {run.id for run in study.plan("tiny")}
    assert len({run.id for run in study.plan("tiny")}) == len(study.plan("tiny"))
    align = {}
    for run in runs:
        if run.way != "stage 0":
            words = study.command(run)[2:]
            args = train.parse_args([*words, "--device", "cpu", "--out", str(tmp_path / "x")])
            assert args.seed == run.seed and args.collab == run.way.split()[0]
            align[run.task, run.way] = args.align
    for (task, way), steps in align.items():  # a gain counts only against the same stage 0
        none = "without" in way or way.startswith("text")
        soft = align["mix" if task == "rates" else task, "soft"]
        assert soft > 0 and steps == (0 if none else soft)

FAKE = """import shutil, sys
from pathlib import Path
words = sys.argv
out = Path(words[words.index("--out") + 1] if "--out" in words else words[words.index("--resume") + 1])
with open("calls", "a") as file:
    print(*words, file=file)
if "prefix" in out.name and not Path("mended").exists():
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
shutil.copy(sys.argv[1] + "/eval.json", sys.argv[1] + "/eval-aligned.json")
"""

def test_the_study_goes_on_where_it_was(runs, tmp_path, monkeypatch, capsys):
    """A finished run gets a row and a curve, a failed one a row with the reason, a stopped one none; whatever
    has a row is not run again, a stopped one goes on; a second study is refused while one is at work."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "train.py").write_text(FAKE.replace("{finished!r}", repr(str(runs["soft"]))))
    (tmp_path / "lab" / "probe.py").write_text(FAKE_PROBE)
    (tmp_path / "eval.py").write_text(FAKE_EVAL)
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs" / "study")
    monkeypatch.setattr(study, "RESULTS", results)
    monkeypatch.setitem(study.BLOCKS, "quick", [(["mix"], ["soft", "single", "prefix", "stage 0"], [0])])
    calls = lambda: (tmp_path / "calls").read_text().splitlines()
    with pytest.raises(ValueError, match="1 runs failed"):
        study.main(["--quick"])
    rows = {row["id"]: row for row in claims.read_rows(results / "study.jsonl")}
    assert set(rows) == {"mix-soft-s0", "mix-prefix-s0", "mix-stage-0-s0"} and len(calls()) == 3
    assert rows["mix-prefix-s0"]["after"] is None and "the disk is full" in rows["mix-prefix-s0"]["reason"]
    study.main(["--quick"])
    assert calls()[3:] == ["train.py --resume runs/study/mix-single-s0"]
    study.main(["--quick"])
    assert len(calls()) == 4
    rows = {row["id"]: row for row in claims.read_rows(results / "study.jsonl")}
    row, report = rows["mix-soft-s0"], json.loads((runs["soft"] / "eval.json").read_text())
    assert (row["after"], row["n"], row["align"], row["way"]) == (report["after"]["strict"], 24, 4, "soft")
    assert row["commit"] is None  # the folder of this test is no repository
    _, policy, _, router = probe.open_run(runs["soft"], "cpu")
    assert row["trainable"] == sum(p.numel() for p in [*policy.parameters(), *router.parameters()])
    assert str(tmp_path) not in json.dumps(row) and "--seed 0" in row["command"]
    curve = json.loads((results / "curves" / "mix-soft-s0.json").read_text())
    assert len(curve["curve"]) == 3 and curve["attended"] and "val" in curve["curve"][-1]
    assert rows["mix-stage-0-s0"]["after"] is not None
    files = figures.draw_all(results)
    assert {"learning.png", "attention.png", "ablations.png"} <= {file.name for file in files}
    capsys.readouterr()
    study.main(["--quick", "--list"])
    assert capsys.readouterr().out.count("done ") == 3
    with open(study.RUNS / "lock", "w") as lock:
        study.fcntl.flock(lock, study.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="still at work"):
            study.main(["--quick"])

def test_points_of_a_curve_are_means():
    metrics = [dict(step=i, reward=float(i), attention={"a": i / 8}) for i in range(1, 9)]
    metrics[3]["val"] = 0.25
    first, second = study.condense(metrics, 2)
    assert first == dict(step=4, reward=2.5, val=0.25, attention={"a": 0.3125}) and second["reward"] == 6.5

def test_rows_curves_study_and_readme_agree():
    rows = claims.read_rows()
    for row in claims.finished():
        assert sum(row["right"]) / row["n"] == pytest.approx(row["after"]), row["id"]
    assert all(row["commit"] and row["command"] for row in rows)
    text = (claims.RESULTS / "STUDY.md").read_text()
    assert study.with_report(text, study.made_report()) == text, "run python lab/study.py --report"
    readme = (HERE / "README.md").read_text()
    ways = ["soft", "stage 0", "soft without stage 0", "soft shuffled", "prefix", "single", "linear"]
    cells = [("mix", way) for way in ways]
    cells += [("real sums", way) for way in ("soft", "stage 0", "single", "prefix", "soft shuffled")]
    for task, way in cells:
        after = [row["after"] for row in claims.runs_of(claims.finished(), task, way)]
        assert f"{claims.mean_and_std(np.array(after))} ({len(after)})" in readme, (task, way)
    with pytest.raises(ValueError, match="study:end"):
        study.with_report(text.replace("<!-- study:end -->", ""), "")
    for page in (HERE / "README.md", claims.RESULTS / "STUDY.md", claims.RESULTS / "SCALE.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"

# -- Probes

def test_ablations_are_what_they_state(soft):
    args, policy, experts, router = soft
    result = probe.ablate(policy, experts, router, args, probe.KINDS)
    data = Dataset(train.load_problems(args, "test"), policy, experts, args)
    assert torch.tensor(result["attended"]).sum(1).allclose(torch.tensor(1.0), atol=0.01)
    assert np.shape(result["knows"]) == (24, 3) and result["datasets"] == [p.dataset for p in data.problems]
    specialists = claims.specialist_places(dict(experts=[dict(name=e.name) for e in experts], **result))
    assert np.mean([row[place] for row, place in zip(result["knows"], specialists)]) > 0.9
    partner = next_of_dataset(data.problems)
    assert sorted(partner) == list(range(24)) and all(i != j for i, j in enumerate(partner))
    assert all(data.problems[i].dataset == data.problems[j].dataset for i, j in enumerate(partner))
    mean = probe.mean_attention(policy, experts, router, args)
    with torch.no_grad():
        assert mean.shape == router(data.H.float())[1].shape[1:] and mean.sum(-1).allclose(torch.ones(()))
    assert "| static | 24 |" in probe.ablation_table(result)

@pytest.mark.parametrize("collab, kind", [("single", "zero"), ("prefix", "shuffle"), ("hard", "static")])
def test_a_senseless_ablation_is_refused(collab, kind):
    with pytest.raises(ValueError, match="could replace"):
        probe.check_kinds(train.Args(collab=collab), [kind])

def test_a_router_spells_what_an_expert_would_say(soft):
    """After twenty steps, more than the commonest text: a router that learned nothing spells none."""
    args, policy, experts, _ = soft
    rows = list(probe.spell(policy, experts, args, steps=20, n_train=256, n_val=64))
    assert len(rows) == 6 and (rows[1]["own_text"], rows[1]["layers"]) == (False, (3,))
    assert list(rows[1]["spelled"]) == [1, 2, 4] and min(rows[1]["spelled"].values()) > 0.5
    assert probe.spell_line(rows[2]).startswith("| the prompt | 2 and 3 | ")
    untaught = probe.spell(policy, experts, args, steps=0, n_train=256, n_val=64)
    assert max(share for row in untaught for share in row["spelled"].values()) < 0.1

def test_walk_tells_a_problem_from_text_to_reward(soft):
    args, policy, experts, router = soft
    text = probe.walk(policy, experts, router, args)
    assert max(map(len, text.splitlines())) <= 110 and "H (1, 3, 160)" in text
    assert text.count("   advantage ") == args.group

# -- Export

@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "soft"
    export.write_export(runs["soft"], folder)
    return folder

def test_exported_lora_in_transformers_is_the_policy(runs, exported):
    """W + alpha / r * B A by PEFT's names, in transformers' own model: the policy's log-probabilities."""
    _, policy, _, _ = probe.open_run(runs["soft"], "cpu")
    adapter = load_file(exported / export.LORA)
    config = json.loads((exported / export.LORA_CONFIG).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "tiny" / "policy", dtype=torch.float32)
    tokens = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = set()
    with torch.no_grad():
        for name in adapter:
            if name.endswith("lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = adapter[name.replace("lora_A", "lora_B")]
                model.get_submodule(module).weight += config["lora_alpha"] / config["r"] * B @ adapter[name]
                changed.add(module.split(".")[-1])
        expected = model(tokens).logits[:, 11:19].log_softmax(-1).gather(-1, tokens[:, 12:, None])[..., 0]
        cache = policy.prefill(tokens[:, :12], torch.tensor([12, 12]))
        ours, _ = policy.logprobs(cache, tokens[:, None, 12:], torch.ones(2, 1, 8, dtype=torch.bool))
        with policy.lora_disabled():
            frozen, _ = policy.logprobs(policy.prefill(tokens[:, :12], torch.tensor([12, 12])),
                                        tokens[:, None, 12:], torch.ones(2, 1, 8, dtype=torch.bool))
    torch.testing.assert_close(ours[:, 0], expected, atol=1e-4, rtol=0)
    assert (ours - frozen).abs().max() > 1e-3 and changed == set(config["target_modules"])

def test_exported_router_can_be_rebuilt(soft, exported):
    _, policy, _, router = soft
    config = json.loads((exported / export.ROUTER_CONFIG).read_text())
    tensors = load_file(exported / export.ROUTER)
    neutral, std = tensors.pop("prefix.neutral"), tensors.pop("prefix.std")
    rebuilt = Router(**config["router"])
    rebuilt.load_state_dict(tensors)
    H = torch.randn(2, 3, 160)
    torch.testing.assert_close(rebuilt(H)[0], router(H)[0], atol=0, rtol=0)
    assert torch.equal(neutral, policy.neutral) and std == policy.embed_std

def test_an_export_takes_no_other_folder_and_has_no_router_where_there_is_none(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export.write_export(runs["soft"], tmp_path)
    folder = tmp_path / "export"
    export.write_export(runs["single"], folder)
    assert not list(folder.glob("router*")) and (folder / export.LORA).is_file()

# -- page.py

HOSTILE = """</script><script>document.title = 'taken'</script><img src=x onerror="document.title = 'x'">"""

@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()

def test_the_page_in_a_browser(runs, browser, tmp_path):
    """No error, the slider moves the map, a problem can be chosen, and a hostile completion stays text."""
    shutil.copytree(runs["soft"], tmp_path / "soft")
    samples = tmp_path / "soft" / "samples.jsonl"
    lines = [json.loads(line) | dict(completion=HOSTILE) for line in samples.read_text().splitlines()]
    samples.write_text("\n".join(map(json.dumps, lines)))
    page_file.main([str(tmp_path / "soft"), str(runs["single"]), "--n", "9"])
    path = tmp_path / "soft" / "run.html"
    assert path.stat().st_size < 2e6
    for width, scheme in ((360, "dark"), (1600, "light")):
        page, errors = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: request.url == path.as_uri() or errors.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#curve-chart svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shares = page.inner_text("#by-dataset")
        page.focus("#step")
        page.keyboard.press("Home")
        assert page.inner_text("#step-shown") == "1" and page.inner_text("#by-dataset") != shares
        button = page.locator("#list button").nth(3)
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        assert button.inner_text()[2:12] in page.inner_text("#one")
        page.fill("#search", "no problem has these words")
        assert page.inner_text("#found") == "0 of 9"
        assert HOSTILE in page.inner_text("#samples") and page.title() == "n-Musketeers: soft"
        page.select_option("#which", "single")
        assert "single" in page.inner_text("#subtitle") and page.locator("#attention").is_hidden()
        assert not errors
        page.close()

def test_the_page_of_a_run_that_has_just_begun(runs, tmp_path):
    """Before the first checkpoint there are curves, but no answers; torn rows are left out."""
    shutil.copytree(runs["soft"], tmp_path / "run")
    for path in [*(tmp_path / "run").glob("*.safetensors"), tmp_path / "run" / "eval.json"]:
        path.unlink()
    seen = page_file.validations([tmp_path / "run"])
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]  # it holds a validation
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(json.loads(last) | dict(step=4)) + '\n{"step": 5, "rew')
    assert page_file.validations([tmp_path / "run"]) != seen  # --watch makes the page anew
    data, answers = page_file.of_files(tmp_path / "run"), page_file.of_models(tmp_path / "run", 3, "cpu")
    assert data["done"] == 4 and data["final"] is None and answers["rows"] == []
    assert "no checkpoint" in answers["note"]

def test_seeds_of_one_kind_are_a_band(runs):
    one = page_file.of_files(runs["soft"])
    better = [None if point["val"] is None else point["val"] + 0.5 for point in one["curve"]]
    other = one | dict(curve=[point | dict(val=val) for point, val in zip(one["curve"], better)])
    bands, kinds = page_file.side_by_side([one, other])
    val = one["curve"][-1]["val"]
    assert (bands[-1]["mean"], bands[-1]["high"]) == pytest.approx((val + 0.25, min(1.0, val + 0.5)))
    assert kinds[0]["runs"] == 2 and kinds[0]["std"] == 0

# -- plan.py

def test_a_plan_counts_what_is_there(soft, capsys):
    """Parameters as loaded, memory that grows with the micro-batch, a GPU ten times as fast in a tenth."""
    args, policy, experts, router = soft
    sizes, pool = plan.Sizes(args.policy), [plan.Sizes(source) for source in args.experts]
    stored = [sum(t.numel() for t in load_file(Path(name) / "model.safetensors").values())
              for name in (args.policy, *args.experts)]
    assert [model.params for model in (sizes, *pool)] == stored
    table = plan.memory(args, sizes, pool, 56)
    trained = 16 * sum(p.numel() for module in (policy, router) for p in module.parameters())
    assert table["LoRA and router, their gradients and AdamW's moments"] == pytest.approx(trained, rel=0.05)
    args.micro_batch = 6
    assert plan.peak(plan.memory(args, sizes, pool, 56)) < plan.peak(table)
    slow, fast = (plan.step_seconds(args, sizes, 56, 8, gpu) for gpu in ((1, 10), (10, 100)))
    assert [a / b for a, b in zip(slow, fast)] == pytest.approx([10, 10])
    plan.main("--preset tiny --length 3 --device cpu".split())
    assert train.run("--preset tiny --plan --device cpu --out never".split()) and not Path("never").exists()
    assert capsys.readouterr().out.count("a step of GRPO") == 2
