"""
What must stay true of lab/specialists.py. On the CPU, without downloads:

    python -m pytest -q lab/test_specialists.py
"""
import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open

from experts import STATES, TEXTS, Expert
from lab import specialists
from lab.claims import HERE
from rewards import Problem

TOKENIZER = HERE / "tiny" / "policy"  # it knows the words of level tiny


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of our own for the experts' texts, and one thread, which is faster for models this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N_MUSKETEERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a random Llama with the tokenizer of the tiny policy."""
    folder = tmp_path_factory.mktemp("model") / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(TOKENIZER / name, folder / name)
    n_tokens = len(transformers.PreTrainedTokenizerFast.from_pretrained(folder))

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=n_tokens, hidden_size=32, intermediate_size=64,
                                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                      max_position_embeddings=512, bos_token_id=None, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def expert(policy):
    return Expert(str(policy), cue=specialists.CUE, max_new=4)


def command(policy, out, *more):
    return ["--policy", str(policy), "--out", str(out), "--level", "tiny", "--steps", "2", "--device", "cpu",
            *more]


# -- What is taught, and how

def test_two_steps_lower_the_loss(expert, monkeypatch):
    monkeypatch.setattr(specialists, "LEARNING_RATE", 0.01)
    lessons, _ = specialists.lessons_of(expert, "chain_sum", "tiny", specialists.BATCH)
    model, losses = specialists.teach(expert, lessons, 2, "chain_sum")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    with torch.no_grad():
        after = specialists.answer_loss(model, expert, lessons).item()
    after /= sum(len(specialists.answer_ids(expert, problem)) for problem in lessons)
    assert losses[0] > losses[1] > after


def test_the_loss_is_that_of_each_answer_alone(expert, monkeypatch):
    """Padding changes nothing, and the loss is a sum over the tokens of answers, with the stop token."""
    monkeypatch.setattr(specialists, "computes_in_bfloat16", lambda device: False)  # for exact numbers
    expert.dtype = torch.float32
    model = expert.load(TEXTS)
    problems = [Problem("1 + 2 =", "3"), Problem("1 + 2 + 3 + 4 =", "1 0"), Problem("7 - 9 =", "-2")]

    total = 0.0
    for problem in problems:
        prompt = expert.tokenize([expert.prompt(problem)])[0]
        answer = specialists.answer_ids(expert, problem)
        assert answer[-1] == 2  # the stop token
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        for place, token in enumerate(answer, start=len(prompt)):
            total -= logits[place - 1].log_softmax(-1)[token].item()

    with torch.no_grad():
        loss = specialists.answer_loss(model, expert, problems).item()
    assert loss == pytest.approx(total, rel=1e-5)


def test_several_gradient_passes_equal_one(expert, monkeypatch):
    monkeypatch.setattr(specialists, "computes_in_bfloat16", lambda device: False)  # for exact numbers
    expert.dtype = torch.float32
    model = expert.load(TEXTS)
    lessons, _ = specialists.lessons_of(expert, "arithmetic", "tiny", 6)

    losses, gradients = [], []
    for size in (6, 2):
        monkeypatch.setattr(specialists, "PASS", size)
        losses.append(specialists.add_gradients(model, expert, lessons))
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_only_training_questions_are_taught(expert):
    lessons, left_out = specialists.lessons_of(expert, "arithmetic", "tiny", 40)
    assert len(lessons) == 40
    assert {problem.split for problem in lessons} == {"train"}
    assert left_out == {}


def test_what_cannot_be_taught(expert, monkeypatch):
    """An answer that is too long is left out. One that the tokenizer cannot write is an error."""
    problems = [Problem("1 + 2 =", "3", dataset="a"), Problem("2 + 2 =", "1 2 3 4 5", dataset="b")]
    monkeypatch.setattr(specialists, "get_problems", lambda *args, **more: list(problems))
    lessons, left_out = specialists.lessons_of(expert, "a+b", "tiny", 5)
    assert lessons == problems[:1]
    assert left_out == {"b": 1}

    del problems[0]
    with pytest.raises(ValueError, match="every answer of b takes more than 4 tokens .* raise --write"):
        specialists.lessons_of(expert, "b", "tiny", 5)

    for answer in ("é", "3\n4"):
        problems[:] = [Problem("1 + 2 =", answer, dataset="c")]
        with pytest.raises(ValueError, match="cannot be taught c, .* choose another --task"):
            specialists.lessons_of(expert, "c", "tiny", 5)


# -- The command

def test_a_specialist_is_made_once_and_is_an_expert(policy, tmp_path, monkeypatch, capsys):
    rows = specialists.run(command(policy, tmp_path, "--families", "arithmetic", "logic"))

    # The folder is an ordinary one, in bfloat16, with nothing of the policy's changed but the weights.
    folder = tmp_path / "logic"
    made = Expert(str(folder))
    assert made.load(STATES) is not None
    assert made.writes
    assert made.stop_ids == Expert(str(policy)).stop_ids
    assert (folder / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    # The table has a row for each family, and a column for the policy and each specialist.
    assert [(row["task"], row["dataset"], row["n"]) for row in rows] == [
        ("arithmetic", "", 96), ("logic", "", len(specialists.validation_problems("logic", "tiny")))]
    assert list(rows[0]["right"]) == ["policy", "arithmetic", "logic"]
    assert json.loads((tmp_path / "specialists.json").read_text())["rows"] == rows
    assert "| arithmetic, tiny | 96 |" in capsys.readouterr().out

    # The same command again makes nothing, and finds the same. Another command does not overwrite it.
    monkeypatch.setattr(specialists, "teach", None)
    assert specialists.run(command(policy, tmp_path, "--families", "arithmetic", "logic")) == rows
    with pytest.raises(ValueError, match="was made with steps 2, and not with 3: choose another --out"):
        specialists.run(command(policy, tmp_path, "--families", "logic", "--steps", "3"))


def test_an_interrupted_one_starts_again_and_a_finished_one_is_kept(policy, tmp_path, monkeypatch):
    save_model = specialists.save_model

    def stopped(model, expert, folder):
        """Ctrl-C while the second specialist is written."""
        save_model(model, expert, folder)
        if "logic" in folder.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(specialists, "save_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        specialists.run(command(policy, tmp_path, "--families", "arithmetic", "logic"))
    first = (tmp_path / "arithmetic" / "model.safetensors").stat()
    assert not (tmp_path / "logic").exists()

    monkeypatch.setattr(specialists, "save_model", save_model)
    rows = specialists.run(command(policy, tmp_path, "--families", "arithmetic", "logic"))
    assert list(rows[0]["right"]) == ["policy", "arithmetic", "logic"]
    assert (tmp_path / "arithmetic" / "model.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arithmetic", "logic", "specialists.json"]


@pytest.mark.parametrize("more, sentence", [
    (["--steps", "0"], "--steps 0 is too small"),
    (["--write", "0"], "--write 0 is too small"),
    (["--task", "chainsum"], "unknown task 'chainsum'"),
    (["--task", "chain_sum", "--level", "huge"], "unknown level 'huge'"),
])
def test_mistakes_are_one_sentence(policy, tmp_path, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        specialists.run(command(policy, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_specialist_is_left_alone(policy, tmp_path):
    (tmp_path / "logic").mkdir()
    with pytest.raises(ValueError, match="is no specialist made by lab.specialists"):
        specialists.run(command(policy, tmp_path, "--families", "logic"))
