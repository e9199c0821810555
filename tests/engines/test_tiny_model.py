import json
import subprocess
import sys

from tests.models import SCRIPT


def digests(folder):
    import hashlib

    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_is_made_deterministically(tiny_model, tmp_path):
    again = tmp_path / "again"
    subprocess.run([sys.executable, str(SCRIPT), str(again)], check=True, capture_output=True)
    assert digests(again) == digests(tiny_model)


def test_is_a_small_qwen2_with_chatml_and_safetensors(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    facts = json.loads((tiny_model / "training.json").read_text())
    assert facts["trained"] is False
    assert 0.9e6 < facts["parameters"] < 1.2e6
    assert (tiny_model / "model.safetensors").is_file()
    assert "<|im_start|>" in (tiny_model / "chat_template.jinja").read_text()


def test_training_lowers_the_loss_and_says_so(tmp_path):
    folder = tmp_path / "trained"
    command = [sys.executable, str(SCRIPT), str(folder), "--train-steps", "12"]
    subprocess.run(command, check=True, capture_output=True)
    facts = json.loads((folder / "training.json").read_text())
    assert facts["trained"] is True
    assert facts["final_loss"] < 7.6  # ln(2048), what guessing gives
