"""The guests' kernel: Debian's image for clouds, ZFS modules built for it, and the first file system it boots from.

Sources: the boot protocol of x86 (Documentation/arch/x86/boot.rst: where the compressed kernel lies in vmlinuz),
modules.dep(5). Tried with Linux 6.1 and ZFS 2.1.11: the modules take 1.6 MB and 155 s on two cores, so they are
cached by what they were built from: the kernel's ABI and the version of zfs-dkms. They never leave this machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from tests.lab.build_root import reach_archives
from tests.lab.build_steps import command, in_root, say, step

IMAGE_PACKAGE = "linux-image-cloud-amd64"
ZFS_PACKAGE = "zfs-dkms"
FIRST_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console", "virtio_net"),
    *("crc32c_generic", "erofs", "overlay", "ext4"),
)
INSIDE = Path(__file__).parent / "inside"
PAYLOAD_OFFSET, PAYLOAD_LENGTH, SETUP_SECTORS = 0x248, 0x24C, 0x1F1
SECTOR = 512
SIZE_AT_END = 4  # how long the kernel is once decompressed
LZ4_LEGACY = bytes.fromhex("02214c18")


def versions(root: Path) -> tuple[str, str]:
    """The ABI of the kernel that the guests get (``6.1.0-50-cloud-amd64``) and the version of zfs-dkms."""
    depends = in_root(root, ["apt-cache", "depends", "--important", IMAGE_PACKAGE])
    found = re.search(r"Depends: linux-image-(\S+)", depends)
    policy = re.search(r"Candidate: (\S+)", in_root(root, ["apt-cache", "policy", ZFS_PACKAGE]))
    if not found or not policy:
        raise ImgStorageError("tool_output", f"apt-cache names no kernel for {IMAGE_PACKAGE}, or no {ZFS_PACKAGE}")
    return found[1], policy[1]


def add_kernel(root: Path, abi: str) -> None:
    """Unpack the kernel and its modules into ``root``, without the scripts of its package."""
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        unpacked = Path(folder) / "kernel"
        in_root(root, ["sh", "-c", 'cd /var/cache/apt/archives && apt-get download "$1"', "sh", f"linux-image-{abi}"])
        (package,) = (root / "var/cache/apt/archives").glob(f"linux-image-{abi}_*.deb")
        command(["dpkg-deb", "--extract", str(package), str(unpacked)])
        # Folder by folder: the package's /lib would replace the link of a root with merged /usr.
        shutil.copytree(unpacked / "lib/modules", root / "usr/lib/modules", symlinks=True)
        shutil.copy2(unpacked / f"boot/vmlinuz-{abi}", root / "boot")
        package.unlink()


def add_zfs(root: Path, abi: str, version: str, cache: Path) -> None:
    """Put the ZFS modules into ``root``; they are built if ``cache`` has none for this kernel and version."""
    kept = cache / f"zfs-{version.replace(':', '%3a')}-{abi}"
    if not kept.is_dir():
        with step(f"ZFS {version} modules for {abi}"), tempfile.TemporaryDirectory(dir=root.parent) as folder:
            built = _build_zfs(root, abi, Path(folder))
            aside = kept.with_suffix(".new")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(built, aside)
            aside.rename(kept)
    shutil.copytree(kept, root / f"usr/lib/modules/{abi}/extra", dirs_exist_ok=True)
    command(["depmod", "--basedir", str(root), abi])


def _build_zfs(root: Path, abi: str, folder: Path) -> Path:
    """Build in an overlay on the root: headers and compilers never get into the root itself."""
    upper, work, merged = (folder / name for name in ("upper", "work", "merged"))
    for path in (upper, work, merged):
        path.mkdir()
    layers = f"lowerdir={root},upperdir={upper},workdir={work}"
    command(["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)])
    command(["mount", "-t", "proc", "proc", str(merged / "proc")])
    try:
        reach_archives(merged)
        in_root(merged, ["apt-get", "-y", "install", f"linux-headers-{abi}", "binutils"])
        in_root(merged, ["apt-get", "-y", "install", ZFS_PACKAGE], timeout_s=3600)
        modules = merged / f"usr/lib/modules/{abi}/updates/dkms"
        found = sorted(modules.glob("*.ko"))
        if not any(path.name == "zfs.ko" for path in found):
            logs = sorted((merged / "var/lib/dkms").rglob("make.log"))
            tail = logs[-1].read_text(errors="replace")[-2000:] if logs else "no log of a build"
            raise ImgStorageError("tool_failed", f"{ZFS_PACKAGE} built no zfs.ko for {abi}: {tail}")
        in_root(merged, ["strip", "--strip-debug", *(f"/{path.relative_to(merged)}" for path in found)])
        out = folder / "modules"
        shutil.copytree(modules, out)
        return out
    finally:
        command(["umount", str(merged / "proc")])
        command(["umount", str(merged)])


def uncompressed(vmlinuz: Path, target: Path) -> None:
    """Write the kernel that ``vmlinuz`` holds compressed: emulated, decompressing it takes seconds of every boot."""
    image = vmlinuz.read_bytes()
    begin = (image[SETUP_SECTORS] + 1) * SECTOR + int.from_bytes(image[PAYLOAD_OFFSET : PAYLOAD_OFFSET + 4], "little")
    length = int.from_bytes(image[PAYLOAD_LENGTH : PAYLOAD_LENGTH + 4], "little")
    payload = image[begin : begin + length - SIZE_AT_END]
    if not payload.startswith(LZ4_LEGACY):
        raise ImgStorageError("tool_output", f"{vmlinuz.name} is not compressed with lz4: {payload[:4].hex()}")
    packed = target.with_suffix(".lz4")
    packed.write_bytes(payload)
    command(["lz4", "--decompress", "--force", "--quiet", str(packed), str(target)])
    packed.unlink()


def initramfs(root: Path, abi: str, first: str, target: Path) -> None:
    """A first file system: one static program, the modules that mounting a root takes, and ``inside/FIRST``."""
    modules = root / "usr/lib/modules" / abi
    builtin = {Path(line).stem.replace("-", "_") for line in (modules / "modules.builtin").read_text().splitlines()}
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).stem.replace("-", "_")] = [path, *others.split()]
    order: list[str] = []
    for name in FIRST_MODULES:
        if name not in needs and name not in builtin:
            raise ImgStorageError("tool_output", f"the kernel {abi} has no module {name}")
        # modules.dep lists the nearest first; each has to come after what it needs itself.
        order += [path for path in reversed(needs.get(name, [])) if path not in order]
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        top = Path(folder)
        for name in ("bin", "modules", "proc", "sys", "dev", "root", "code", "state", "new"):
            (top / name).mkdir()
        shutil.copy2("/bin/busybox", top / "bin/busybox")
        shutil.copy2(INSIDE / first, top / "init")
        (top / "init").chmod(0o755)
        for path in order:
            shutil.copy2(modules / path, top / "modules")
        (top / "modules/order").write_text("".join(f"{Path(path).name}\n" for path in order))
        names = "".join(f"{path.relative_to(top)}\n" for path in sorted(top.rglob("*")))
        command(["cpio", "--quiet", "-o", "-H", "newc", "-D", str(top), "-F", str(target)], stdin=names)
    say(f"{len(order)} modules in the file system of {first}")
