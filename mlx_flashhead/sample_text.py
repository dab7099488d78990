"""A few hundred tokens of several kinds, to measure a head on when it is built."""

SAMPLE_TEXT = '''\
The lighthouse stood at the end of a narrow road that the sea washed over twice a day.
Every evening Marta walked out before the tide, lit the lamp, and sat down with her
book until the water let her go home again. On the night of the great storm she
noticed, far out, a second light that answered hers.

def moving_average(values, window):
    """Return the mean of each run of `window` values."""
    if window < 1:
        raise ValueError("window must be positive")
    total = sum(values[:window])
    means = [total / window]
    for old, new in zip(values, values[window:]):
        total += new - old
        means.append(total / window)
    return means

Q: What should I pack for a week of hiking in the mountains?
A: Here is a short list:
1. A waterproof jacket and warm layers
2. Good boots that you have already worn in
3. A map, a compass and a charged phone
4. Water, a filter, and food for one extra day
5. A first-aid kit
Would you like advice on any of these?

Le marché du samedi occupe toute la place. On y trouve des fromages, des olives, du
pain chaud et, au printemps, les premières fraises. Die meisten Leute kommen früh, weil
es später heiß wird. Los niños corren entre los puestos y los perros duermen a la
sombra de los árboles.

{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"],
 "works": [{"title": "Notes on the Analytical Engine", "year": 1843}]}
'''
