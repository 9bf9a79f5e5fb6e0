"""What all modules share."""

import torch


class _Loss(torch.nn.Module):
    """A loss whose options are attributes, named as the arguments of its constructor."""

    _options: tuple[str, ...] = ()  # these names, in the order in which the module is printed

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)
