"""What looks at the machine, which is not to be traced: torch.compile calls it and takes the answer for a constant.

Imported while torch.compile traces, and not before: to mark a function so imports all of its machinery, which takes a
second.
"""

import torch

from . import _backend, _transforms

automatic = torch.compiler.assume_constant_result(_backend.look_for_automatic)
namespace = torch.compiler.assume_constant_result(_backend.look_for_namespace)
transform = torch.compiler.assume_constant_result(_transforms.look_for_transform)
