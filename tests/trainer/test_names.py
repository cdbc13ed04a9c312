"""The public names of the package."""

import opsdc


def test_dir_shows_every_public_name_and_each_is_there():
    assert set(opsdc.__all__) <= set(dir(opsdc))
    assert all(getattr(opsdc, name) is not None for name in opsdc.__all__)
