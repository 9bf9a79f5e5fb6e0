def triplet_strip_(*arguments):
    raise NotImplementedError
