"""Recipes: what is shipped, what files can say, and how they are refused."""

import pytest

from sparse_kernels.formats import BFLOAT16, MatrixFormat
from sparserve.compression.recipe import SHIPPED, read_recipe
from sparserve.errors import ConfigError


@pytest.fixture
def recipe_of(tmp_path):
    def read(text: str):
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(str(path))

    return read


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_found_by_name(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.formats().layers_quantized


def test_formats_are_those_of_each_kind_of_matrix(recipe_of):
    recipe = recipe_of("""
name: mine
compensate: qera
attention: {bits: 8, group_size: 32, rank: 32}
gate_up: {bits: 4, group_size: 128, low_bits: 2, rank: 64}
down: {bits: 4}
lm_head: {bits: 16}
activation_bits: 8
calibration: {windows: 4, tokens: 64}
""")
    formats = recipe.formats()
    assert formats.attention == MatrixFormat(8, 32, 0, 32)
    assert formats.gate_up == MatrixFormat(4, 128, 2, 64)
    assert formats.down == MatrixFormat(4, 64)
    assert formats.lm_head == BFLOAT16
    assert formats.activation_bits == 8
    assert recipe.needs_text


@pytest.mark.parametrize(
    ("settings", "needs_text"),
    [
        ("quantizer: rtn", False),
        ("quantizer: rtn, compensate: lorc, down: {rank: 32}", False),
        ("quantizer: rtn, compensate: qera-diagonal, down: {rank: 32}", True),
        ("quantizer: gptq", True),
    ],
)
def test_only_data_free_recipes_need_no_text(recipe_of, settings, needs_text):
    assert recipe_of("{name: mine, " + settings + "}").needs_text is needs_text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{name: a, quantiser: gptq}", "quantiser is no setting; there are name, quantizer,"),
        ("{name: a, down: {width: 4}}", "down.width is no setting; there are bits, group_size,"),
        ("{name: a, calibration: {rows: 4}}", "calibration.rows is no setting; there are windows"),
        ("quantizer: gptq", "name is missing"),
        ("{name: a, quantizer: awq}", "quantizer is 'awq': Input should be 'rtn' or 'gptq'"),
        ("{name: a, down: {bits: 3}}", "down.bits is 3: Input should be 4, 8 or 16"),
        ("{name: a, down: {bits: '4'}}", "down.bits is '4'"),
        ("{name: a, down: 4}", "down is 4"),
        ("{name: a, down: {group_size: 48}}", "down: group_size of a matrix of 4 bits is 48; it can"),
        ("{name: a, down: {low_bits: 3}}", "down: low_bits of a matrix of 4 bits is 3; it can"),
        ("{name: a, compensate: qera, down: {rank: 8}}", "down: rank is 8; it can be multiples of 32"),
        ("{name: a, compensate: qera, down: {bits: 16, rank: 32}}", "bfloat16 has rank 32"),
        ("{name: a, compensate: lorc, lm_head: {rank: 32}}", "lm_head has rank 32; an LM head can"),
        ("{name: a, down: {rank: 32}}", "down has rank 32 and compensate is none; take rank 0, or"),
        ("{name: a, compensate: qera}", "compensate is qera and all ranks are 0; give a matrix"),
        ("{name: a, quantizer: rtn, act_order: true}", "which only quantizer gptq has an order for"),
        ("{name: a, quantizer: rtn, target: outputs}", "which quantizer rtn cannot follow; take gptq"),
        ("{name: a, value_bits: 5}", "value_bits is 5: Input should be 2, 3 or None"),
        ("{name: a, calibration: {windows: 0}}", "calibration.windows is 0: Input should be greater"),
        ("{name: A B}", "name is 'A B'"),
        ("- a\n- b", "must be lines of `name: value`"),
        ("", "must be lines of `name: value`"),
        ("{name: [", "is no YAML"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed_is_told(recipe_of, text, told):
    with pytest.raises(ConfigError) as caught:
        recipe_of(text)
    assert told in str(caught.value)
    assert "own.yaml" in str(caught.value)


def test_all_bfloat16_and_value_bits_of_nothing_are_refused(recipe_of):
    parts = ("attention", "gate_up", "down", "lm_head")
    with pytest.raises(ConfigError, match="nothing is compressed; give one 4 or 8"):
        recipe_of("\n".join(["name: a", *(f"{part}: {{bits: 16}}" for part in parts)]))
    with pytest.raises(ConfigError, match="value_bits is 3, and no matrix of a layer has 4 bits"):
        recipe_of("\n".join(["name: a", "value_bits: 3", *(f"{p}: {{bits: 8}}" for p in parts)]))


def test_a_recipe_that_is_nowhere_is_told_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="no recipe 'best': expected quality, balanced, fast, or"):
        read_recipe("best")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(str(tmp_path / "latin.yaml"))
