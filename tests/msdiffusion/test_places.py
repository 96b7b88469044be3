"""Where shipped things lie, and how paths are shown."""

from msdiffusion.places import DEFAULT_MODEL, REPOSITORY, shown


def test_repository_is_where_the_sources_are():
    assert (REPOSITORY / "msdiffusion" / "places.py").is_file()
    assert DEFAULT_MODEL.is_relative_to(REPOSITORY)


def test_paths_are_shown_from_where_one_stands(tmp_path, monkeypatch):
    assert shown(DEFAULT_MODEL / "config.json") == "checkpoints/tiny/config.json"
    assert shown(tmp_path / "a") == str(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a") == "a"
    assert shown("owner/hub-name") == "owner/hub-name"
