"""From `sparserve calibrate` to `sparserve eval`: what the index predicts beside what comes out."""

import json

OWN = ("--backend", "reference", "--threads", "1", "--kv-cache-gib", "0.01")
SMALL = ("--windows", "4", "--prompt-tokens", "40", "--decode-tokens", "8")


def test_an_index_is_evaluated_on_a_text_that_it_has_not_seen(run_main, tiny_folder, tmp_path):
    seen, other, index, report = (tmp_path / name for name in ("seen", "other", "index", "rows"))
    seen.write_text("rivers and stones and birds that sing over green hills. " * 60)
    other.write_text("A dog barked twice; nobody answered, for it was nearly midnight. " * 20)
    made = run_main(
        "calibrate", tiny_folder, "--text", seen, "--out", index, *OWN, *SMALL, "--quick"
    )
    assert made[0] == 0, made[2]
    asked = ["--model", tiny_folder, *OWN, *SMALL, "--index", index, "--json", report]
    words = "dense,core:0.7,token:0.8/gate,kl:0.3"
    status, out, err = run_main("eval", other, *asked, "--policies", words)
    assert status == 0, err
    rows = json.loads(report.read_text())
    assert [row["policy"] for row in rows] == words.split(",")
    for row in rows[1:3]:
        assert row["predicted_kl"] > 0
        assert row["kl_dense"] > 0
    assert abs(rows[1]["density"] - 0.7) < 0.02
    assert rows[3]["resolved"].startswith(("core:", "token:", "dense"))
    assert "against the same format dense" in out
    status, _, err = run_main("eval", seen, *asked, "--policies", "core:0.7")
    assert status == 1
    assert "the index was calibrated on" in err
