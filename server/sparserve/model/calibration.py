"""A page of text of many kinds, which every model is shown where it must be known what it computes."""

CALIBRATION_TEXT = """\
The river rises in the northern hills and crosses three provinces before it reaches the sea. Its delta was
settled early; by the twelfth century the town had a harbour, two markets and a school. In 1843 a railway
joined it to the capital, 210 km away, and within a generation its population had grown from 9,000 to 64,500.

Q: Why does ice float on water?
A: Because water expands when it freezes. The molecules form an open lattice, so a litre of ice weighs about
8% less than a litre of water.

def moving_average(values: list[float], width: int) -> list[float]:
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        result.append(total / min(i + 1, width))
    return result

"I don't think she'll come," said Tom, looking at the clock. "It's nearly midnight, and it has begun to snow."
Nobody answered. Outside, a dog barked twice and then fell silent.

Dear Ms. Alvarez,
Thank you for your order of 12 May. Two of the five items are out of stock; we will send them next week at no
extra cost. Please let us know if you would rather have a refund.

1. Heat the oil in a large pan and fry the onions until they are golden.
2. Add the garlic, the tomatoes and a pinch of salt.
3. Simmer for twenty minutes; serve with rice.

{"name": "sensor-7", "unit": "C", "readings": [21.4, 21.6, null], "active": true}

Let f(x) = x^2 - 4x + 3. Then f'(x) = 2x - 4, which is zero at x = 2, so the minimum is f(2) = -1.

Le gouvernement a annoncé hier une nouvelle loi sur les transports. Die Sitzung beginnt um neun Uhr im großen
Saal. El niño abrió la puerta y salió corriendo. 今天天气很好。 我们去公园散步。

The committee finds that (a) the data were collected with consent, (b) the methods are described well enough
to be repeated, and (c) the conclusions follow from the results. We therefore recommend publication after
minor revisions, in particular of Table 2 and of the discussion of limits in Section 4.
"""
