"""`sparserve calibrate`."""

import pytest


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("rivers and stones and birds that sing over green hills. " * 60)
    return path


SMALL = ("--backend", "reference", "--threads", "1", "--kv-cache-gib", "0.01", "--quick",
         "--windows", "4", "--prompt-tokens", "40", "--decode-tokens", "8")  # fmt: skip


@pytest.mark.parametrize("given", [(), ("--model",)])
def test_an_index_is_written_and_its_curve_shown(run_main, tiny_folder, text_file, tmp_path, given):
    out_file = tmp_path / "index.safetensors"
    arguments = (*given, tiny_folder, "--text", text_file, "--out", out_file, *SMALL)
    status, out, err = run_main("calibrate", *arguments)
    assert (status, out_file.is_file()) == (0, True)
    assert "core" in out
    assert "token by gate" in out
    assert "index written to" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--windows", "100"), "100 were asked for: give more text"),
        (("--prompt-tokens", "600"), "exceed the context"),
        (("--text", "/nowhere/text"), "cannot be read"),
        (("--out", "/nowhere/index"), "does not exist"),
        (("--weight-planes", "4+4"), "weight_planes"),
        (("--device-map", "auto"), "take --device-map cpu"),
        (("--model", "smollm2-135m-instruct"), "give one of them"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    run_main, tiny_folder, text_file, tmp_path, arguments, said
):
    before = (tiny_folder, "--text", text_file, "--out", tmp_path / "index", *SMALL)
    status, _, err = run_main("calibrate", *before, *arguments)
    assert status == 1
    assert said in " ".join(err.split())
    assert not (tmp_path / "index").exists()
