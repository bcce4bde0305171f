from streamflow import disk


def test_the_type_of_a_file_system_is_that_of_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "2 1 0:40 / /srv/data rw,relatime - nfs4 host:/data rw\n"
        "3 1 0:41 / /srv/my\\040disk rw,relatime shared:3 - cifs //host/disk rw\n"
    )
    kinds = {"/srv/data/x/log.db": "nfs4", "/srv/database": "ext4", "/srv/my disk/log.db": "cifs", "/": "ext4"}
    for path, kind in kinds.items():
        assert disk.file_system_type(path, str(mounts)) == kind
    assert disk.file_system_type("/x", str(tmp_path / "missing")) is None
