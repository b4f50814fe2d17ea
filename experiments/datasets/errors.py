"""The one exception of the datasets package."""


class DatasetError(ValueError):
  """Data that is missing, broken or not as expected.

  The message names the file or argument, what was expected there, and what
  to do about it.
  """
