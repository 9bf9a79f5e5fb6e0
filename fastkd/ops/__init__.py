"""One file per schedule: fakes, autograd, and the call of the compiled op."""
