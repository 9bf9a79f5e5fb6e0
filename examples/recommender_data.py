"""Who took what: the interactions of examples/distill_recommender.py, synthetic or of MovieLens 100K.

The synthetic ones need no download and no licence. MovieLens 100K (Harper and Konstan 2015) is for research,
not for commerce, and may not be passed on: so it is not here, and whoever has the folder as GroupLens
distributes it names it with --data. A rating, whatever its stars, counts as an interaction.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FILES = ("u.data", "u.user", "u.item")
LATENT, AGES, OCCUPATIONS, GENRES, YEARS, SERIES = 8, 6, 12, 16, 8, 50  # of the synthetic data
SERIES_PER_USER = 4


@dataclass
class Interactions:
    name: str
    taken: torch.Tensor  # bool [users, items]
    user_side: torch.Tensor  # what is known of users, [users, A]
    item_side: torch.Tensor  # and of items, [items, B]


def make_synthetic(users, items, seed=0):
    """Users who each take a few items, drawn without replacement from a softmax over all.

    An item's logit is the product of latent factors, which age group, occupation, genre and year shift,
    plus its popularity, plus a constant where it belongs to one of the few series that the user follows.
    Which items form a series is in no feature: only who takes what tells it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def draw(kinds, count):
        return torch.randint(kinds, (count,), generator=generator)

    age, occupation = draw(AGES, users), draw(OCCUPATIONS, users)
    genre, year, series = draw(GENRES, items), draw(YEARS, items), draw(SERIES, items)
    tastes = 0.6 * normal(AGES, LATENT)[age] + 0.6 * normal(OCCUPATIONS, LATENT)[occupation]
    traits = 0.8 * normal(GENRES, LATENT)[genre] + 0.5 * normal(YEARS, LATENT)[year]
    affinity = (tastes + 0.8 * normal(users, LATENT)) @ (traits + 0.6 * normal(items, LATENT)).T
    popularity = -0.8 * torch.log1p(torch.randperm(items, generator=generator).float())
    followed = torch.rand(users, SERIES, generator=generator).argsort(1) < SERIES_PER_USER
    logits = 1.2 * affinity / math.sqrt(LATENT) + popularity + 3.5 * followed[:, series]
    gumbel = -torch.log(-torch.log(torch.rand(users, items, generator=generator)))
    place = (logits + gumbel).argsort(1, descending=True).argsort(1)
    wanted = (15 + 40 * torch.exp(0.7 * normal(users))).long().clamp(max=items // 4)
    user_side = torch.cat([F.one_hot(age, AGES), F.one_hot(occupation, OCCUPATIONS)], 1).float()
    item_side = torch.cat([F.one_hot(genre, GENRES), F.one_hot(year, YEARS)], 1).float()
    return Interactions("synthetic", place < wanted[:, None], user_side, item_side)


def read_lines(path, separator, fields):
    """The fields of each line; a line with another number of them is an error."""
    lines = [line.split(separator) for line in path.read_text(encoding="latin-1").splitlines()]
    for number, line in enumerate(lines, 1):
        if len(line) != fields:
            raise ValueError(f"{path}, line {number}: {fields} fields wanted, got {len(line)}")
    return lines


def read_movielens(folder):
    """MovieLens 100K: age group, gender and occupation of users, genres and year of films."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no file {name}, wanted are {', '.join(FILES)} of MovieLens 100K")
    users = read_lines(folder / "u.user", "|", 5)
    films = read_lines(folder / "u.item", "|", 24)
    taken = torch.zeros(len(users), len(films), dtype=torch.bool)
    for number, (user, film, _, _) in enumerate(read_lines(folder / "u.data", "\t", 4), 1):
        if not (1 <= int(user) <= len(users) and 1 <= int(film) <= len(films)):
            raise ValueError(f"{folder / 'u.data'}, line {number}: user {user} or film {film} is not among the others")
        taken[int(user) - 1, int(film) - 1] = True
    occupations = sorted({occupation for _, _, _, occupation, _ in users})
    age = torch.tensor([min(int(user[1]) // 10, 7) for user in users])
    gender = torch.tensor([user[2] == "F" for user in users])
    occupation = torch.tensor([occupations.index(user[3]) for user in users])
    genres = torch.tensor([[float(flag) for flag in film[5:]] for film in films])
    # Decades to 1980, then years; one film has no date.
    years = [int(film[2][-4:]) if film[2] else 1980 for film in films]
    bins = sorted({year if year > 1980 else year // 10 * 10 for year in years})
    year = torch.tensor([bins.index(year if year > 1980 else year // 10 * 10) for year in years])
    sides = [F.one_hot(age, 8), F.one_hot(gender.long(), 2), F.one_hot(occupation)]
    shares = genres / genres.sum(1, keepdim=True).clamp(min=1)
    return Interactions("MovieLens 100K", taken, torch.cat(sides, 1).float(), torch.cat([shares, F.one_hot(year)], 1))


def hold_out(taken, share, seed):
    """Splits each user's interactions at random: those to learn from, and a share, at least one, to be scored on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(taken.shape, generator=generator).masked_fill(~taken, 2).argsort(1).argsort(1)
    held = taken & (order < (share * taken.sum(1, keepdim=True)).round().clamp(min=1))
    return taken & ~held, held
