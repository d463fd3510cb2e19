"""Recipes: what is shipped, what files can say, and how they are refused."""

import pytest

from sparse_kernels.formats import BFLOAT16, LayerFormats, MatrixFormat
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
    assert all(own.quantized for own in recipe.formats_of("down"))


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
        ("quantizer: rtn, prune: {mlp: 0.2, criterion: random, restore: none}", False),
        ("quantizer: rtn, prune: {mlp: 0.2, criterion: magnitude, restore: bias}", True),
        ("quantizer: rtn, prune: {mlp: 0.2, criterion: wanda, restore: none}", True),
        ("quantizer: gptq, prune: {mlp: 0.2, criterion: random, restore: none}", True),
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
        ("{name: a, overrides: {layers: 1}}", "overrides is {'layers': 1}"),
        ("{name: a, overrides: [{down: {bits: 8}}]}", "overrides.0.layers is missing"),
        ("{name: a, overrides: [{layers: 1}]}", "overrides.0: there is nothing that changes; give attention,"),
        ("{name: a, overrides: [{layers: 1, downs: {bits: 8}}]}", "overrides.0.downs is no setting; there are layers, att"),
        ("{name: a, overrides: [{layers: 1, down: {bit: 8}}]}", "overrides.0.down.bit is no setting; there are bits, gr"),
        ("{name: a, overrides: [{layers: 1, lm_head: {bits: 8}}]}", "overrides.0.lm_head is no setting; there are la"),
        ("{name: a, overrides: [{layers: 1, down: {bits: 5}}]}", "overrides.0.down.bits is 5: Input should be 4, 8"),
        ("{name: a, overrides: [{layers: 5-3, down: {bits: 8}}]}", "overrides.0: layers must be one or more, each o"),
        ("{name: a, overrides: [{layers: [1, 1], down: {bits: 8}}]}", "overrides.0: layers must be one or more, eac"),
        ("{name: a, overrides: [{layers: 1-x, down: {bits: 8}}]}", "overrides.0.layers: expected a layer, a range"),
        ("{name: a, overrides: [{layers: -1, down: {bits: 8}}]}", "overrides.0.layers.0 is -1: Input should be gr"),
        ("{name: a, overrides: [{layers: 0-99999999, down: {bits: 8}}]}", "is 4096: Input should be less than 4096"),
        ("{name: a, overrides: [{layers: 1.5, down: {bits: 8}}]}", "overrides.0.layers is 1.5"),
        ("{name: a, overrides: [{layers: 1, down: {rank: 32}}]}", "overrides.0.down has rank 32 and compensate is none"),
        ("{name: a, overrides: [{layers: 1, down: {low_bits: 1}}]}", "layer 1 has lower planes of (0, 1) bits"),
        (
            "{name: a, overrides: [{layers: 1-2, down: {bits: 8}}, {layers: 0-2, down: {group_size: 32}}]}",
            "overrides.0 has no effect: later ones replace all of it",
        ),
        ("{name: a, down: {bits: 4}, down: {bits: 8}}", "is no YAML: down is given twice in"),
        ("{name: a, down: {bits: 4, bits: 8}}", "is no YAML: bits is given twice in"),
        ("{name: 2001-99-99}", "is no YAML: month must be in 1..12"),
        ("{name: a, down: {group_size: " + "9" * 5000 + "}}", "is no YAML: Exceeds the limit"),
        ("name: " + "[" * 5000, "is no YAML: maximum recursion depth"),
        ("{name: a, ? [b] : 1}", "is no YAML: while constructing a mapping"),
        ("{name: &a [*a]}", "name is [[[[[[[...]]]]]]]: Input should be a valid string"),
        ("{name: a, mixed: {}}", "mixed: give one of target_bits and target_kl"),
        ("{name: a, mixed: {target_bits: 5, target_kl: 1}}", "mixed: give one of target_bits and target_kl"),
        ("{name: a, mixed: {target_bits: 17}}", "mixed.target_bits is 17: Input should be less than or equal to 16"),
        ("{name: a, mixed: {target_kl: .inf}}", "mixed.target_kl is inf: Input should be a finite number"),
        ("{name: a, mixed: {target_kl: 0}}", "mixed.target_kl is 0: Input should be greater than 0"),
        ("{name: a, mixed: {bits: 5}}", "mixed.bits is no setting; there are target_bits, target_kl, choices"),
        ("{name: a, mixed: {target_kl: 1, choices: [{bits: 8}]}}", "mixed.choices is [{'bits': 8}]"),
        ("{name: a, mixed: {target_kl: 1, choices: [{}, {group_size: 64}]}}", "mixed: choices has one twice"),
        ("{name: a, mixed: {target_kl: 1, choices: [{}, {low_bits: 1}]}}", "mixed: choices differ in low_bits"),
        ("{name: a, mixed: {target_kl: 1, choices: [{}, {bit: 1}]}}", "mixed.choices.1.bit is no setting; there are bits"),
        ("{name: a, mixed: {target_kl: 1, choices: [{}, {rank: 32}]}}", "mixed.choices.1 has rank 32 and compensate is none"),
        ("{name: a, mixed: {target_kl: 1}, down: {bits: 8}}", "down is given, and mixed chooses the formats; leave one"),
        ("{name: a, mixed: {target_kl: 1}, value_bits: 3}", "value_bits is given, and mixed chooses"),
        ("{name: a, mixed: {target_kl: 1}, overrides: [{layers: 1, down: {bits: 8}}]}", "overrides is given, and mixed"),
        ("{name: a, mixed: {target_kl: 1}, compensate: qera, lm_head: {rank: 32}}", "lm_head has rank 32"),
        ("name: a\nprune:\n", "prune is empty; give settings, {} for the defaults, or leave it out"),
        ("name: a\nheal:\n", "heal is empty; give settings"),
        ("name: a\ncalibrate: null\n", "calibrate is empty"),
        ("name: a\nmixed: ~\n", "mixed is empty"),
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


def test_what_is_wrong_with_much_is_told_briefly(recipe_of):
    """Anchors make much of a few lines, and a list can have a problem in each of its members."""
    tens = [f"l{level}: &l{level} [{', '.join(10 * [f'*l{level - 1}'])}]" for level in range(1, 6)]
    with pytest.raises(ConfigError, match="l5 is no setting") as caught:
        recipe_of("\n".join(["l0: &l0 words", *tens, "name: *l5"]))
    assert len(str(caught.value)) < 3000
    layers = ", ".join(map(str, range(4096, 8192)))
    with pytest.raises(ConfigError, match=r"layers\.9 is 4105.*\nand 4086 more$") as caught:
        recipe_of(f"{{name: a, overrides: [{{layers: [{layers}], down: {{bits: 8}}}}]}}")


def test_overrides_are_of_some_layers_and_later_ones_win(recipe_of):
    recipe = recipe_of("""
name: mine
compensate: qera
attention: {rank: 32}
overrides:
  - {layers: 1-3, down: {bits: 8}, attention: {bits: 8, group_size: 32}}
  - {layers: [3, 5], attention: {bits: 16}}
  - {layers: 7, gate_up: {group_size: 64}}
""")
    int4, int8, ranked = MatrixFormat(4, 64), MatrixFormat(8, 64), MatrixFormat(4, 64, 0, 32)
    usual = LayerFormats(ranked, int4, int4)
    formats = recipe.formats()
    assert [formats.layer(index) for index in range(8)] == [
        usual,
        *2 * [LayerFormats(MatrixFormat(8, 32), int4, int8)],
        LayerFormats(BFLOAT16, int4, int8),
        usual,
        LayerFormats(BFLOAT16, int4, int4),
        *2 * [usual],
    ]
    assert [index for index, _ in formats.overrides] == [1, 2, 3, 5], "7 has what all have"
    assert set(recipe.formats_of("attention")) == {ranked, MatrixFormat(8, 32), BFLOAT16}
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe


def test_what_is_mixed_has_a_ladder_and_no_formats_yet(recipe_of):
    plain = recipe_of("{name: a, mixed: {target_bits: 5}}")
    assert [part.format() for part in plain.choices] == [
        MatrixFormat(4, 64), MatrixFormat(4, 32), MatrixFormat(8, 64),
    ]  # fmt: skip
    ranked = recipe_of("{name: a, compensate: qera, mixed: {target_kl: 0.05}}")
    assert [part.rank for part in ranked.choices] == [0, 0, 0, 32]
    own = recipe_of(
        "{name: a, quantizer: rtn, mixed: {target_kl: 1, choices: [{bits: 8}, {bits: 16}]}}"
    )
    assert [part.bits for part in own.choices] == [8, 16]
    assert own.needs_text
    with pytest.raises(ValueError, match="a is mixed; it has formats once it is allocated"):
        own.formats()


def test_all_bfloat16_and_value_bits_of_nothing_are_refused(recipe_of):
    parts = ("attention", "gate_up", "down", "lm_head")
    with pytest.raises(ConfigError, match="nothing is compressed; give one 4 or 8"):
        recipe_of("\n".join(["name: a", *(f"{part}: {{bits: 16}}" for part in parts)]))
    with pytest.raises(ConfigError, match="value_bits is 3, and no matrix of a layer has 4 bits"):
        recipe_of("\n".join(["name: a", "value_bits: 3", *(f"{p}: {{bits: 8}}" for p in parts)]))


def test_a_recipe_that_is_nowhere_is_told_with_those_there_are(tmp_path):
    with pytest.raises(
        ConfigError,
        match="no recipe 'best': expected quality, balanced, fast, none with --prune, or",
    ):
        read_recipe("best")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(str(tmp_path / "latin.yaml"))
