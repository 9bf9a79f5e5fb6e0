"""fastkd's losses where people train already, a module for each host. None is imported by ``fastkd`` itself, and none
needs anything but its host."""
