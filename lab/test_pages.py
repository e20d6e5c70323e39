"""What must stay true of page, probe and export. On the CPU, without downloads:   python -m pytest -q lab"""
import json
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train
from lab import export, figures, page, probe
from rewards import next_in_dataset
from rlvr import Dataset, load_problems
from router import ROUTERS, Router

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = ("--preset tiny --steps 3 --batch 12 --micro_batch 12 --val 12 --test 24 --eval_every 3 "
         "--words_steps 8 --device cpu").split()

# A router of one's own, as a user writes it for --extension.
EXTENSION = """
from router import ROUTERS, Router

class Own(Router):
    pass

ROUTERS["own"] = Own
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three short runs on the embedded pool: {name: folder}.

    attention  with stage 0, two experts are compared
    none       without experts
    own        with a router of one's own, from an extension, and without stage 0
    """
    folder = tmp_path_factory.mktemp("runs")
    extension = folder / "own_router.py"
    extension.write_text(EXTENSION)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N_MUSKETEERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        train.run([*SHORT, "--reading_steps", "4", "--out", str(folder / "attention")])
        train.run([*SHORT, "--router", "none", "--out", str(folder / "none")])
        train.run([*SHORT, "--router", "own", "--extension", str(extension), "--reading_steps", "0",
                   "--out", str(folder / "own")])
        yield {name: folder / name for name in ("attention", "none", "own")}
    ROUTERS.pop("own", None)
    for number, handler in handlers.items():  # train.py sets its own
        signal.signal(number, handler)


@pytest.fixture
def opened(runs):
    """(args, policy, experts, router) of the run with attention."""
    return probe.open_finished(runs["attention"], "cpu")


# -- Probes

def test_ablations_are_what_they_state(opened):
    args, policy, experts, router = opened
    result = probe.ablate(policy, experts, router, args, probe.KINDS)
    dataset = Dataset(load_problems(args, "test"), policy, experts, args)

    # For every problem: its dataset, the attention, and who knows the answer. That is its specialist.
    assert torch.tensor(result["attended"]).sum(1).allclose(torch.tensor(1.0), atol=0.01)
    assert result["datasets"] == [problem.dataset for problem in dataset.problems]
    assert np.shape(result["knows"]) == (24, 3)
    specialist = {"chain_sum": 0, "family_relationships": 1, "count_primes": 2}
    specialist_knows = [row[specialist[name]] for row, name in zip(result["knows"], result["datasets"])]
    assert np.mean(specialist_knows) > 0.9

    # Shuffled states are those of another problem of the same dataset, each of them used once.
    partner = next_in_dataset(dataset.problems)
    assert sorted(partner) == list(range(24))
    for i, j in enumerate(partner):
        assert i != j and dataset.problems[i].dataset == dataset.problems[j].dataset

    # Static attention is the mean over training problems.
    static = probe.mean_attention(policy, experts, router, args)
    assert static.shape == (router.heads, args.latents, 3)
    assert static.sum(-1).allclose(torch.ones(()))
    assert "| static | 24 |" in probe.ablation_table(result)


@torch.no_grad()
def test_replaced_routers_return_what_they_should(opened):
    args, policy, experts, router = opened
    H = torch.randn(2, 3, 160)
    visible = torch.ones(2, 3, dtype=torch.bool)
    context, attention = router(H, visible)

    same_context, _ = probe.WithAttention(router, attention)(H, visible)
    torch.testing.assert_close(same_context, context)
    uniform_context, uniform = probe.WithAttention(router, torch.tensor(1 / 3))(H, visible)
    assert uniform.shape == attention.shape and (uniform == uniform.flatten()[0]).all()
    assert not torch.allclose(uniform_context, context)
    neutral, no_attention = probe.WithNeutralContext(router)(H, visible)
    assert neutral.shape == context.shape and not neutral.any() and no_attention is None


@pytest.mark.parametrize("router, kind", [("none", "zero"), ("constant", "shuffle"), ("hard", "static")])
def test_a_senseless_ablation_is_refused(router, kind):
    with pytest.raises(ValueError, match="could replace"):
        probe.check_kinds(train.Args(router=router), [kind])


def test_every_router_has_the_ablations_that_make_sense():
    probe.check_kinds(train.Args(router="attention"), ["static", "uniform", "shuffle", "zero"])
    probe.check_kinds(train.Args(router="mixed"), ["static", "uniform", "shuffle", "zero"])
    probe.check_kinds(train.Args(router="hard"), ["shuffle", "zero"])
    with pytest.raises(ValueError, match="choose from shuffle, zero"):
        probe.check_kinds(train.Args(router="hard"), ["static"])
    probe.check_kinds(train.Args(router="linear"), ["shuffle", "zero"])
    probe.check_kinds(train.Args(router="constant"), ["zero"])


def test_a_router_spells_what_an_expert_would_say(opened):
    """After twenty steps, more than the commonest text. A router that learned nothing spells none."""
    args, policy, experts, _ = opened
    rows = list(probe.spell(policy, experts, args, steps=20, n_train=256, n_val=64))
    assert len(rows) == 6
    assert (rows[1]["states"], rows[1]["layers"]) == ("last:4", (3,))
    assert list(rows[1]["spelled"]) == [1, 2, 4] and min(rows[1]["spelled"].values()) > 0.5
    assert probe.spell_line(rows[2]).startswith("| the prompt | 2 and 3 | ")

    for row in probe.spell(policy, experts, args, steps=0, n_train=256, n_val=64):
        assert max(row["spelled"].values()) < 0.1


def test_the_states_of_some_layers_stand_where_the_reader_puts_them():
    assert probe.places_of_states((2,), 3, 1) == [0]
    assert probe.places_of_states((3,), 3, 4) == [4, 5, 6, 7]
    assert probe.places_of_states((2, 3), 3, 2) == [0, 1, 4, 5]


def test_walk_tells_a_problem_from_text_to_reward(opened):
    args, policy, experts, router = opened
    text = probe.walk(policy, experts, router, args)
    assert max(map(len, text.splitlines())) <= 110
    assert "H (1, 3, 160)" in text
    assert text.count("   advantage ") == args.group


def test_probes_from_the_command_line(runs, capsys):
    probe.run([str(runs["own"]), "--ablate", "static", "--device", "cpu"])
    assert "| static | 24 |" in capsys.readouterr().out
    result = json.loads((runs["own"] / "ablate.json").read_text())
    assert list(result) == ["right", "kinds", "datasets", "attended", "knows"]
    assert result["knows"] == []  # this run has no stage 0, so it asked its experts for no texts
    probe.run([str(runs["none"]), "--walk", "--device", "cpu"])
    assert "8 answers sampled" in capsys.readouterr().out


# -- Export

@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "attention"
    export.write_export(runs["attention"], folder)
    return folder


@torch.no_grad()
def test_exported_lora_in_transformers_is_the_policy(opened, exported):
    """W + alpha / r * B A by PEFT's names, in transformers' own model: the policy's log-probabilities."""
    _, policy, _, _ = opened
    adapter = load_file(exported / export.LORA)
    config = json.loads((exported / export.LORA_CONFIG).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(REPOSITORY / "tiny" / "policy",
                                                              dtype=torch.float32)
    tokens = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))

    changed = set()
    for name, A in adapter.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = adapter[name.replace("lora_A", "lora_B")]
            model.get_submodule(module).weight += config["lora_alpha"] / config["r"] * B @ A
            changed.add(module.split(".")[-1])
    logp = model(tokens).logits[:, 11:19].log_softmax(-1)
    expected = logp.gather(-1, tokens[:, 12:, None])[..., 0]

    batch = Namespace(tokens=tokens[:, :12], lengths=torch.tensor([12, 12]))
    completion, mask = tokens[:, None, 12:], torch.ones(2, 1, 8, dtype=torch.bool)
    ours, _ = policy.score(batch, None, completion, mask)
    with policy.lora("off"):
        frozen, _ = policy.score(batch, None, completion, mask)
    torch.testing.assert_close(ours[:, 0], expected, atol=1e-4, rtol=0)
    assert (ours - frozen).abs().max() > 1e-3
    assert changed == set(config["target_modules"]) and config["lora_alpha"] == 2 * config["r"] == 16


@torch.no_grad()
def test_exported_router_can_be_rebuilt(opened, exported):
    _, policy, _, router = opened
    config = json.loads((exported / export.ROUTER_CONFIG).read_text())
    tensors = load_file(exported / export.ROUTER)
    origin, std = tensors.pop("prefix.origin"), tensors.pop("prefix.std")
    rebuilt = ROUTERS[config["router"]](**config["arguments"])
    assert type(rebuilt) is Router
    rebuilt.load_state_dict(tensors)
    H = torch.randn(2, 3, 160)
    torch.testing.assert_close(rebuilt(H)[0], router(H)[0], atol=0, rtol=0)
    assert torch.equal(origin, policy.prefix_origin) and std == policy.embed_std


def test_an_export_needs_an_empty_folder_and_has_a_router_only_if_the_run_has_one(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export.write_export(runs["attention"], tmp_path)
    folder = tmp_path / "export"
    export.write_export(runs["none"], folder)
    assert not list(folder.glob("router*")) and (folder / export.LORA).is_file()


def test_an_export_shows_no_folder_of_this_computer_and_names_the_extension(runs, tmp_path):
    export.write_export(runs["own"], tmp_path / "export")
    for name in ("export.json", "router.json", "README.md"):
        assert str(runs["own"].parent) not in (tmp_path / "export" / name).read_text()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "own_router.py" in card and "- tiny/policy: mit" in card and "| all | 24 |" in card
    assert export.public_name("/home/me/models/qwen") == "qwen"
    assert export.public_name("Qwen/Qwen2.5-0.5B@1a2b") == "Qwen/Qwen2.5-0.5B@1a2b"


# -- The page: what it reads from files

def test_two_runs_with_one_name_are_told_apart(runs, tmp_path):
    first, second = copy_run(runs["none"], tmp_path / "a/run"), copy_run(runs["none"], tmp_path / "b/run")
    text = page.write_page([first, second], 2).read_text()
    for folder in (first, second):
        assert f'"name":"{folder.resolve()}"' in text


def copy_run(run, folder):
    shutil.copytree(run, folder)
    return folder


def rewrite_records(path, change):
    """Apply change(record) to every record of a .jsonl file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def with_null(value):
    """The same record with null in place of every number."""
    if isinstance(value, dict):
        return {key: with_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_null(item) for item in value]
    return None if isinstance(value, (int, float)) else value


def test_the_page_shows_who_is_right_where(runs):
    data = page.from_files(runs["attention"])
    records = [json.loads(line) for line in (runs["attention"] / "metrics.jsonl").read_text().splitlines()]
    assert data["compared"] and data["experts"] == ["arithmetic", "logic", "algorithmic"]
    assert data["kind"] == "attention, stage 0, compared"
    assert [moment["step"] for moment in data["moments"]] == [1, 2, 3]

    # A run of 3 steps is not smoothed: each moment has the rewards of its own step.
    for moment, record, point in zip(data["moments"], records, data["curve"]):
        assert moment["rewards"] == record["reward_by_expert"]
        assert moment["attention"] == record["attention_by_dataset"]
        assert point["reward"] == record["reward"]


def test_rewards_by_expert_are_averaged_over_the_steps_that_drew_the_expert():
    records = [dict(reward_by_expert={"sums": {"a": 1.0, "b": 0.5}}),
               dict(reward_by_expert={"sums": {"a": 0.0, "c": None}}),  # c: the step met a NaN
               dict()]                                                  # nothing was compared
    assert page.rewards_by_expert(records) == {"sums": {"a": 0.5, "b": 0.5, "c": None}}


def test_a_point_of_a_curve_is_the_mean_of_a_tenth_of_the_run():
    assert [page.smoothing(steps) for steps in (0, 3, 19, 40, 99, 1000)] == [1, 1, 1, 4, 9, 10]
    records = [dict(step=step, reward=reward) for step, reward in enumerate([0.0, 1.0, None, 0.5], start=1)]
    curve = page.learning_curve(records, 2)
    assert [point["reward"] for point in curve] == [0.0, 0.5, 1.0, 0.5]


def test_a_sampled_group_is_compared_with_itself_alone(runs):
    """Where experts are compared, a group is a half: 4 of the 8 answers, all with the same expert visible."""
    for name, size in (("attention", 4), ("none", 8)):
        groups = page.from_files(runs[name])["samples"]
        assert {len(group["answers"]) for group in groups} == {size}
        for group in groups:
            advantages = [answer["advantage"] for answer in group["answers"]]
            assert abs(sum(advantages)) < 0.05  # they are rounded to 2 digits


def test_the_command_on_the_page_makes_the_same_run(runs, tmp_path):
    for name in ("attention", "none", "own"):
        args = page.settings_of(runs[name])
        command = page.command_of(args).split()
        again = vars(train.parse_args([*command[2:], "--device", "cpu", "--out", str(tmp_path / "new")]))
        assert again | dict(out="") == args | dict(out="")


def test_the_page_of_a_run_that_has_just_begun(runs, tmp_path):
    """Before the first checkpoint there are curves, but no answers. A torn record is left out."""
    run = copy_run(runs["attention"], tmp_path / "run")
    for path in [*run.glob("*.safetensors"), run / "eval.json"]:
        path.unlink()
    seen = page.how_far([run])

    metrics = run / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])  # it holds a validation
    with open(metrics, "a") as file:
        file.write(json.dumps(last | dict(step=4)) + '\n{"step": 5, "rew')
    assert page.how_far([run]) != seen  # --watch writes the page again

    data = page.from_files(run)
    answers = page.from_checkpoint(run, 3)
    assert data["done"] == 4 and data["final"] is None
    assert answers["rows"] == [] and "no checkpoint" in answers["note"]


def test_seeds_of_one_kind_are_a_band(runs):
    one = page.from_files(runs["attention"])
    better = []
    for point in one["curve"]:
        val = None if point["val"] is None else point["val"] + 0.5
        better.append(point | dict(val=val))
    bands, kinds = page.compare_runs([one, one | dict(curve=better)])
    val = one["curve"][-1]["val"]
    assert (bands[-1]["mean"], bands[-1]["high"]) == pytest.approx((val + 0.25, min(1.0, val + 0.5)))
    assert kinds[0]["runs"] == 2 and kinds[0]["std"] == 0


def test_a_run_of_another_version_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"args": {"collab": "soft"}, "models": [], "ranks": 1}')
    with pytest.raises(ValueError, match="another version"):
        page.from_files(tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        page.from_files(tmp_path / "nowhere")


def test_a_router_of_ones_own_is_imported_from_the_run_or_from_the_command_line(runs, tmp_path):
    # A new process would not know it.
    probe.import_once.cache_clear()
    ROUTERS.pop("own")
    answers = page.from_checkpoint(runs["own"], 3)
    assert len(answers["rows"]) == 3 and ROUTERS["own"].__name__ == "Own"

    # The extension has moved.
    run = copy_run(runs["own"], tmp_path / "run")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace("own_router.py", "moved.py"))
    probe.import_once.cache_clear()
    ROUTERS.pop("own")
    assert "moved.py is not there" in page.from_checkpoint(run, 3)["note"]
    answers = page.from_checkpoint(run, 3, extension=str(runs["own"].parent / "own_router.py"))
    assert len(answers["rows"]) == 3


def test_the_page_names_its_missing_packages(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ValueError, match="pip install -r lab/requirements.txt"):
        page.javascript_bundle()
    with pytest.raises(SystemExit):
        page.run(["--help"])
    assert "--watch" in capsys.readouterr().out


def test_json_cannot_end_its_script():
    text = page.json_for_script(["</script><!--", "&\u2028"])
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == ["</script><!--", "&\u2028"]


# -- The page in a browser

HOSTILE = """</script><script>document.title = 'taken'</script><img src=x onerror="document.title = 'x'">"""

# Every word or number, on the screen, that begins in one line and ends in another. A line may be broken after
# a hyphen or a slash. What is longer than any line has to be broken, so that 30 characters are no word.
BROKEN_WORDS = r"""() => {
  const broken = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest("script, style, option")) continue;
    for (const match of node.data.matchAll(/[\p{L}\p{N}_.,%+]+/gu)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      const tops = new Set([...range.getClientRects()].map(rect => Math.round(rect.top)));
      if (tops.size > 1 && match[0].length < 30) broken.push(match[0]);
    }
  }
  return broken;
}"""


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, as Debian installs it."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a file at a width. Returns the page, and a list that collects its errors."""
    pages = []

    def open_at(path, width, color_scheme="light"):
        opened_page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=color_scheme)
        pages.append(opened_page)
        errors = []

        def note_message(message):
            if message.type == "error":
                errors.append(message.text)

        def note_request(request):
            if request.url != path.as_uri():
                errors.append(request.url)

        opened_page.on("pageerror", lambda error: errors.append(str(error)))
        opened_page.on("console", note_message)
        opened_page.on("request", note_request)
        opened_page.goto(path.as_uri())
        opened_page.wait_for_selector("#curve-chart svg")
        return opened_page, errors

    yield open_at
    for opened_page in pages:
        opened_page.close()


@pytest.mark.parametrize("width, color_scheme", [(360, "dark"), (1600, "light")])
def test_the_page_in_a_browser(runs, open_page, tmp_path, width, color_scheme):
    """No error; the slider moves the numbers; a problem can be chosen; a hostile completion stays text."""
    run = copy_run(runs["attention"], tmp_path / "attention")
    rewrite_records(run / "samples.jsonl", lambda record: record.update(completion=HOSTILE))
    page.run([str(run), str(runs["none"]), "--n", "9"])
    path = run / "run.html"
    assert path.stat().st_size < 2e6

    shown, errors = open_page(path, width, color_scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width

    # The slider.
    before = shown.inner_text("#by-dataset"), shown.inner_text("#rewards-table")
    shown.focus("#step")
    shown.keyboard.press("Home")
    after = shown.inner_text("#by-dataset"), shown.inner_text("#rewards-table")
    assert shown.inner_text("#step-shown") == "1"
    assert before[0] != after[0] and before[1] != after[1]

    # The list of problems.
    button = shown.locator("#list button").nth(3)
    button.focus()
    shown.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert button.inner_text()[2:12] in shown.inner_text("#one")
    shown.fill("#search", "no problem has these words")
    assert shown.inner_text("#found") == "0 of 9"

    # Sampled answers, and the other run.
    assert HOSTILE in shown.inner_text("#samples") and shown.title() == "n-Musketeers: attention"
    shown.select_option("#which", "none")
    assert "none" in shown.inner_text("#subtitle") and shown.locator("#attention").is_hidden()
    assert not errors


def test_rewards_and_attention_stand_side_by_side_for_every_dataset(runs, open_page, tmp_path):
    run = copy_run(runs["attention"], tmp_path / "run")
    page.run([str(run), "--n", "3"])
    shown, errors = open_page(run / "run.html", 1200)

    # Two charts, of rewards and of attention, for each of three datasets.
    shown.wait_for_function("document.querySelectorAll('#over-steps svg').length === 6")

    # The numbers are those of the last step.
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for dataset, rewards in record["reward_by_expert"].items():
        cells = shown.locator("#rewards-table tr", has_text=dataset).locator("td").all_inner_texts()
        for expert, cell in zip(("arithmetic", "logic", "algorithmic"), cells, strict=True):
            if expert in rewards:
                assert float(cell) == pytest.approx(rewards[expert], abs=0.0051)
            else:
                assert cell == "–"
    assert not errors


def test_a_step_with_nan_does_not_break_the_page(runs, open_page, tmp_path):
    """rlvr.append writes null for NaN. Older files may hold NaN itself, which is no JSON."""
    run = copy_run(runs["attention"], tmp_path / "run")
    metrics = run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[1] = with_null(records[1]) | dict(step=2)
    records[2]["val"] = None
    text = "\n".join(map(json.dumps, records))
    for content in (text, text.replace("null", "NaN")):
        metrics.write_text(content)
        page.run([str(run), "--n", "3"])
        shown, errors = open_page(run / "run.html", 360)
        shown.focus("#step")
        shown.keyboard.press("Home")
        shown.keyboard.press("ArrowRight")
        assert shown.inner_text("#step-shown") == "2"
        assert "–" in shown.inner_text("#by-dataset") and "–" in shown.inner_text("#rewards-table")
        assert not errors


@pytest.mark.parametrize("width", [360, 1200])
def test_no_word_and_no_number_is_broken_inside(runs, open_page, tmp_path, width):
    """At 360 pixels, too, and with the names of real models. What is too wide is scrolled."""
    run = copy_run(runs["attention"], tmp_path / "run")
    names = dict(arithmetic="Qwen2.5-Coder-0.5B-Instruct", logic="OLMo-2-0425-1B-Instruct")

    def rename(text):
        for old, new in names.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        return text

    metrics = run / "metrics.jsonl"
    metrics.write_text(rename(metrics.read_text()))
    page.run([str(run), str(runs["none"]), "--n", "6"])
    shown, errors = open_page(run / "run.html", width)
    assert shown.evaluate(BROKEN_WORDS) == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors

    # The check itself finds a number like 0.0 2.
    shown.add_style_tag(content="td.heat { white-space: normal; overflow-wrap: anywhere; max-width: 1ch; }"
                                "table { table-layout: fixed; width: 10rem; }")
    assert shown.evaluate(BROKEN_WORDS) != []


# -- Figures

def row_of(task, way, seed):
    """A made-up row of a finished run, with its curve."""
    curve = []
    for step in (5, 10):
        attention = {"sums": {"a": 0.5 + step / 40, "b": 0.5 - step / 40}}
        curve.append(dict(step=step, reward=step / 10, val=step / 20, attention_entropy=1.0 / step,
                          attention_by_dataset=attention))
    curve[0]["val"] = None  # a step that met a NaN
    kinds = dict(static=dict(right=[0, 0]), zero=dict(right=[0, 1]))
    return dict(task=task, way=way, seed=seed, before=0.1, after=0.5 + 0.1 * seed, curve=curve,
                experts=[dict(name="a"), dict(name="b")],
                attention_by_dataset=curve[-1]["attention_by_dataset"],
                by_dataset={"sums": dict(after=0.5)}, masked={"a": {"sums": 0.1}, "b": {"sums": 0.5}},
                ablate=dict(right=[1, 0], kinds=kinds))


def test_every_picture_can_be_drawn(tmp_path, monkeypatch):
    rows = []
    for task in ("mix", "sums", "real mix", "real family", "real copies"):
        for way in ("soft", "single", "hard", "soft without comparing"):
            rows += [row_of(task, way, seed) for seed in (0, 1)]
    monkeypatch.setattr(figures, "finished", lambda results: rows)
    files = figures.draw_all(tmp_path)
    assert {path.stem for path in files} == set(figures.PICTURES)
    assert all(path.stat().st_size > 1000 for path in files)


def test_pictures_without_runs_are_left_out():
    for name, picture in figures.PICTURES.items():
        assert name == "gsm8k" or picture([]) is None


def test_a_curve_by_hand():
    run = dict(curve=[dict(step=1, val=0.5), dict(step=2), dict(step=3, val=None), dict(step=4, val=1.0)])
    assert figures.values_of(run, ["val"]) == {1: 0.5, 4: 1.0}
    assert figures.means_of_last([2, 4, 6], 2) == [2, 3, 5]
    assert figures.from_to([3, 5]) == "3 to 5" and figures.from_to([3, 3]) == "3"
