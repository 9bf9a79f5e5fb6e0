"""Who took what: the interactions of examples/distill_recommender.py, synthetic or of MovieLens 100K.

The synthetic ones need no download and no licence. MovieLens 100K (Harper and Konstan 2015) is for research,
not for commerce, and may not be passed on: so it is not here, and whoever has the folder as GroupLens
distributes it names it with --data. A rating, whatever its stars, counts as an interaction.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LINES = {  # of MovieLens 100K, and what is read of them
    "u.data": r"(\d+)\t(\d+)\t\d+\t\d+",  # user, film
    "u.user": r"\d+\|(\d+)\|([MF])\|(\w+)\|[^|]*",  # age, gender, occupation
    "u.item": r"\d+\|[^|]*\|(?:\d+-\w+-(\d{4}))?\|[^|]*\|[^|]*((?:\|[01]){19})",  # year, genres
}
LATENT, AGES, OCCUPATIONS, GENRES, YEARS, SERIES = 8, 6, 12, 16, 8, 50  # of the synthetic data
SERIES_PER_USER = 4


@dataclass
class Interactions:
    name: str
    taken: torch.Tensor  # bool [users, items]
    user_side: torch.Tensor  # what is known of users, [users, A]
    item_side: torch.Tensor  # and of items, [items, B]


def make_synthetic(users, items, seed=0):
    """Users who each take few items, half of them at most 20, drawn without replacement from a softmax over all.

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
    wanted = (8 + 12 * torch.exp(0.7 * normal(users))).long().clamp(max=items // 4)
    user_side = torch.cat([F.one_hot(age, AGES), F.one_hot(occupation, OCCUPATIONS)], 1).float()
    item_side = torch.cat([F.one_hot(genre, GENRES), F.one_hot(year, YEARS)], 1).float()
    return Interactions("synthetic", place < wanted[:, None], user_side, item_side)


def read_lines(folder, name):
    """What LINES wants of each line of a file; a line of another form is an error."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no file {name}, wanted are {', '.join(LINES)} of MovieLens 100K")
    matches = [re.fullmatch(LINES[name], line) for line in path.read_text(encoding="latin-1").splitlines()]
    if None in matches:
        raise ValueError(f"{path}, line {matches.index(None) + 1} is not of the form it has in MovieLens 100K")
    return [match.groups() for match in matches]


def read_movielens(folder):
    """MovieLens 100K: age group, gender and occupation of users, genres and year of films."""
    ratings, users, films = (read_lines(folder, name) for name in LINES)
    taken = torch.zeros(len(users), len(films), dtype=torch.bool)
    for number, (user, film) in enumerate(ratings, 1):
        if not (1 <= int(user) <= len(users) and 1 <= int(film) <= len(films)):
            raise ValueError(f"{folder / 'u.data'}, line {number}: user {user} or film {film} is in no other file")
        taken[int(user) - 1, int(film) - 1] = True
    occupations = sorted({occupation for _, _, occupation in users})
    age = torch.tensor([min(int(age) // 10, 7) for age, _, _ in users])
    gender = torch.tensor([int(gender == "F") for _, gender, _ in users])
    occupation = torch.tensor([occupations.index(occupation) for _, _, occupation in users])
    genres = torch.tensor([[float(flag) for flag in flags.split("|")[1:]] for _, flags in films])
    # Decades to 1980, then years; one film has no date.
    years = [int(year or 1980) for year, _ in films]
    years = [year if year > 1980 else year // 10 * 10 for year in years]
    bins = sorted(set(years))
    year = torch.tensor([bins.index(year) for year in years])
    sides = [F.one_hot(age, 8), F.one_hot(gender, 2), F.one_hot(occupation)]
    shares = genres / genres.sum(1, keepdim=True).clamp(min=1)
    return Interactions("MovieLens 100K", taken, torch.cat(sides, 1).float(), torch.cat([shares, F.one_hot(year)], 1))


def hold_out(taken, share, seed):
    """Splits each user's interactions at random: those to learn from, and a share, at least one, to be scored on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(taken.shape, generator=generator).masked_fill(~taken, 2).argsort(1).argsort(1)
    held = taken & (order < (share * taken.sum(1, keepdim=True)).round().clamp(min=1))
    return taken & ~held, held
