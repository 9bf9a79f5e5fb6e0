"""The models of examples/distill_recommender.py: a factorization machine and a wide-and-deep network."""

from typing import NamedTuple

import torch
from torch import nn

FACTORS = 8  # of the factorization machine
EMBEDDING, HIDDEN = 32, 32  # of the wide-and-deep network


class Features(NamedTuple):
    """Rows of one-hot ids beside other features: the vectors of a factorization machine."""

    ids: torch.Tensor  # [N]
    side: torch.Tensor  # [N, A]

    def times(self, table):
        """Their product with a table [ids + A, D]."""
        known = len(table) - self.side.shape[1]
        return table[self.ids] + self.side @ table[known:]

    def squared(self):
        return Features(self.ids, self.side.square())


class Output(NamedTuple):
    scores: torch.Tensor  # [users, items]
    users: torch.Tensor  # representations, [users, D]
    items: torch.Tensor  # [items, D]


class FactorizationMachine(nn.Module):
    """Score of x, a user's and an item's features: the sum of w_i x_i and of <v_i, v_j> x_i x_j over pairs i < j.

    Terms without an item's feature are left out: they are equal for all items of a user, and change no ranking
    and no softmax.
    """

    def __init__(self, user_features, item_features):
        super().__init__()
        self.user_factors = nn.Parameter(0.05 * torch.randn(user_features, FACTORS))
        self.item_factors = nn.Parameter(0.05 * torch.randn(item_features, FACTORS))
        self.item_weights = nn.Parameter(torch.zeros(item_features, 1))

    def forward(self, users, items):
        user, item = users.times(self.user_factors), items.times(self.item_factors)
        # The pairs within an item, in linear time: half of the square of the sum less the sum of squares.
        pairs = 0.5 * (item.square() - items.squared().times(self.item_factors.square())).sum(1)
        return Output(user @ item.T + items.times(self.item_weights)[:, 0] + pairs, user, item)


class WideAndDeep(nn.Module):
    """A linear model of crossed features plus an MLP of embeddings."""

    def __init__(self, user_features, item_features, users):
        super().__init__()
        # A user's id crossed with an item's would learn by heart what the user took, and nothing else.
        self.crossed = nn.Parameter(torch.zeros(user_features - users, item_features))
        self.item_weights = nn.Parameter(torch.zeros(item_features, 1))
        self.user_embedding = nn.Parameter(0.05 * torch.randn(user_features, EMBEDDING))
        self.item_embedding = nn.Parameter(0.05 * torch.randn(item_features, EMBEDDING))
        self.dropout = nn.Dropout(0.2)
        # The first layer of user and item side by side is a sum, and most of it is computed once per row.
        self.from_user = nn.Linear(EMBEDDING, HIDDEN)
        self.from_item = nn.Linear(EMBEDDING, HIDDEN, bias=False)
        self.deep = nn.Sequential(
            nn.ReLU(), nn.Linear(HIDDEN, HIDDEN // 2), nn.ReLU(), nn.Linear(HIDDEN // 2, 1, bias=False)
        )

    def forward(self, users, items):
        user, item = users.times(self.user_embedding), items.times(self.item_embedding)
        wide = items.times((users.side @ self.crossed).T).T + items.times(self.item_weights)[:, 0]
        pairs = self.from_user(self.dropout(user))[:, None] + self.from_item(self.dropout(item))
        return Output(wide + self.deep(pairs)[..., 0], user, item)
