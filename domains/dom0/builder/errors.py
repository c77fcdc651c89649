"""The one error of the domain builder."""


class BuildError(ValueError):
    """The image or the request cannot make a guest. One line that names the thing and what is wrong with
    it."""
