"""Every command there is, as data: what is typed, what it means, who answers it.

Help, completion, ``docs/commands.md`` and the man page are made from this. In the order in which help shows them.
"""

from __future__ import annotations

from imgstorage.cli.grammar import Argument, Parameter, Verb

NAS = Argument(name="NAS", help="the NAS host", offers="nas")
NASES = Argument(name="NAS", help="the NAS hosts; all of them if none is named", many=True, offers="nas")
ZPOOL = Argument(name="ZPOOL", help="the pool on the NAS", offers="pool")
VOLUME = Argument(name="VOLUME", help="the volume's name in its pool", offers="volume")
HOST = Argument(name="HOST", help="the host that runs the virtual machine: a VM container", offers="container")
CONTAINERS = Argument(
    name="HOST", help="the VM containers; all of them if none is named", many=True, offers="container"
)

TABLE = (
    Parameter(
        name="output-col",
        value="COLUMN,…",
        help="the columns to show, in this order; blanks in a name may be left out or written _",
        in_usage=False,
    ),
    Parameter(
        name="output-header", value="yes|no", boolean=True, default="yes", help="whether to print headers",
        in_usage=False,
    ),
    Parameter(
        name="output-format", value="text|json", choices=("text", "json"), default="text", in_usage=False,
        help="json: all columns, sizes in bytes, times in seconds, null for an empty cell; the same as --json",
    ),
)  # fmt: skip
WAIT = Parameter(
    name="wait", value="yes|no", boolean=True, default="yes",
    help="no: return when the work is accepted, and say under which operation it goes on",
)  # fmt: skip
ZPOOL_OF_NAME = Parameter(
    name="zpool", value="POOL", also=("pool",), help="which, if several pools have a volume of this name"
)
DIR = Parameter(
    name="dir", value="FOLDER", help="where the sandbox is", default="that of the user's last sandbox", path=True
)

VERBS = (
    Verb(
        words=("add", "host", "storagemap"),
        summary="map a volume to a host",
        text="Makes a volume usable on a VM container, and prints the device to open. A volume that does not exist is "
        "created, empty, which is said; SIZE counts only then. The command returns when the device can be used. In "
        "sync mode the volume is then copied to the container in the background, while the device is in use.",
        handler="imgstorage.cli.storagemap:add",
        arguments=(
            NAS,
            ZPOOL,
            VOLUME,
            HOST,
            Argument(name="SIZE", help="of a new volume: a number of GiB, or with K, M, G or T behind it"),
        ),
        parameters=(
            Parameter(
                name="remotepool", value="POOL", help="the pool on the container for the local copy",
                default="the container's vm_container_zpool",
            ),
            Parameter(
                name="img_sync", value="yes|no", boolean=True, default="the host's img_sync, else the frontend's",
                help="yes: copy the volume to the container; no: use it over the network for good",
            ),
            Parameter(
                name="wait", value="yes|no", boolean=True, default="no",
                help="yes: return when the container needs the NAS no more",
            ),
        ),
        examples=("add host storagemap nas-0-0 tank vol1 compute-0-3 10",),
    ),
    Verb(
        words=("list", "host", "storagemap"),
        summary="what is mapped where",
        text="Shows the volumes of NAS hosts, which container has each, and how far its copy is. States: unmapped; "
        "mapped; NAS->VM while it is copied to the container; NAS<-VM while what changed goes back; NAS<-VM sched "
        "while a pull does that and the device stays in use; quarantined when two copies differ and an operator has to "
        "choose.",
        handler="imgstorage.cli.storagemap:list_maps",
        arguments=(NASES,),
        parameters=TABLE,
        columns="imgstorage.cli.storagemap:COLUMNS",
        examples=(
            "list host storagemap nas-0-0",
            "list host storagemap nas-0-0 output-col=zvol,state,progress,note output-header=no",
        ),
    ),
    Verb(
        words=("list", "host", "storagedev"),
        summary="devices of containers",
        text="Shows the devices of VM containers: what each is made of, and how far its merge is.",
        handler="imgstorage.cli.storagedev:list_devices",
        arguments=(CONTAINERS,),
        parameters=TABLE,
        columns="imgstorage.cli.storagedev:COLUMNS",
        examples=("list host storagedev compute-0-3",),
    ),
    Verb(
        words=("sync", "host", "storagemap"),
        summary="pull what changed so far",
        text="Brings what was written to a volume so far back to the NAS, while the device stays in use: the NAS then "
        "has the disk as it was when the pull began, compared and applied. Only what changed since the last pull "
        "travels. In direct mode every write is on the NAS already. Unmapping the volume cancels a pull; nothing is "
        "lost by that.",
        handler="imgstorage.cli.storagemap:sync",
        arguments=(NAS, VOLUME),
        parameters=(ZPOOL_OF_NAME, WAIT),
        examples=("sync host storagemap nas-0-0 vol1",),
    ),
    Verb(
        words=("remove", "host", "storagemap"),
        summary="unmap a volume",
        text="Takes a volume back from its container. Success means that the container has let go of it; what it "
        "changed then goes back to the NAS, whose copy is complete when the state is unmapped. imgstorage waits for "
        "that unless told otherwise, rocks does not: it names the operation under which the way back goes on.",
        handler="imgstorage.cli.storagemap:remove",
        arguments=(NAS, VOLUME),
        parameters=(
            ZPOOL_OF_NAME,
            Parameter(
                name="force", value="yes|no", boolean=True, default="no",
                help="yes: cut off whatever still holds the device open",
            ),
            Parameter(
                name="wait", value="yes|no", boolean=True, default="yes as imgstorage, no as rocks",
                help="yes: return when the NAS has everything; no: when the container has let go",
            ),
        ),
        examples=("remove host storagemap nas-0-0 vol1",),
    ),
    Verb(
        words=("add", "host", "storageimg"),
        summary="make a volume",
        text="Makes an empty volume, or one with the contents of a disk image (raw or qcow2) that is on the NAS. The "
        "same again, while it goes on or when it is done, says so and is a success; whether the file has changed since "
        "is not looked at.",
        handler="imgstorage.cli.storageimg:add",
        arguments=(
            NAS,
            ZPOOL,
            VOLUME,
            Argument(
                name="SIZE", help="a number of GiB, or with K, M, G or T behind it", optional=True,
                usage="SIZE|file=IMAGE",
            ),
        ),
        parameters=(
            Parameter(
                name="file", value="IMAGE", help="instead of SIZE: a disk image, as an absolute path on the NAS",
                in_usage=False, path=True,
            ),
            WAIT,
        ),
        examples=("add host storageimg nas-0-0 tank vol2 file=/var/images/debian.qcow2",),
    ),
    Verb(
        words=("list", "host", "storageimg"),
        summary="the volumes of NAS hosts",
        text="Shows the volumes of NAS hosts, mapped or not.",
        handler="imgstorage.cli.storageimg:list_images",
        arguments=(NASES,),
        parameters=TABLE,
        columns="imgstorage.cli.storageimg:COLUMNS",
        examples=("list host storageimg nas-0-0",),
    ),
    Verb(
        words=("grow", "host", "storageimg"),
        summary="make a volume larger",
        text="Gives a volume more room; the new space reads as zeros. SIZE is the size that it shall have, and cannot "
        "be less than it has; repeating the command is harmless. A volume in use grows with its device: in direct mode "
        "the NAS's volume first, and a guest's reads and writes wait for some seconds; a volume that is local on its "
        "container there first, and the NAS's copy with a pull that begins at once. While a volume is copied, merged "
        "or on its way back it is refused. A device with a path shows its new size at once, also to those who have it "
        "open; over nbd+unix:// who opens it from then on sees it. Making partitions and file systems larger is left "
        "to the guest.",
        handler="imgstorage.cli.storageimg:grow",
        arguments=(
            NAS,
            ZPOOL,
            VOLUME,
            Argument(name="SIZE", help="the new size: a number of GiB, or with K, M, G or T behind it"),
        ),
        parameters=(WAIT,),
        examples=("grow host storageimg nas-0-0 tank vol1 20",),
    ),
    Verb(
        words=("dump", "host", "storageimg"),
        summary="write a volume to a file",
        text="Writes the bytes of an unmapped volume to a new raw disk image on the NAS.",
        handler="imgstorage.cli.storageimg:dump",
        arguments=(NAS, ZPOOL, VOLUME),
        parameters=(
            Parameter(
                name="file", value="PATH", required=True, help="the new file, as an absolute path on the NAS", path=True
            ),
            WAIT,
        ),
        examples=("dump host storageimg nas-0-0 tank vol1 file=/var/images/vol1.raw",),
    ),
    Verb(
        words=("remove", "host", "storageimg"),
        summary="move a volume to trash",
        text="Moves an unmapped volume to the NAS's trash, where it stays for the time that the NAS is configured for.",
        handler="imgstorage.cli.storageimg:remove",
        arguments=(NAS, ZPOOL, VOLUME),
        examples=("remove host storageimg nas-0-0 tank vol1",),
    ),
    Verb(
        words=("list", "host"),
        summary="hosts, and which answer",
        text="Shows the hosts that the frontend knows, and which of their daemons are connected.",
        handler="imgstorage.cli.hosts:list_hosts",
        parameters=TABLE,
        columns="imgstorage.cli.hosts:COLUMNS",
    ),
    Verb(
        words=("show", "operation"),
        summary="how far an operation is",
        text="An operation is what one command set going; its id is in the messages of that command. With wait=yes the "
        "exit status is that of the operation.",
        handler="imgstorage.cli.operation:show",
        arguments=(Argument(name="OP", help="the operation's id: op-…"),),
        parameters=(
            Parameter(
                name="wait", value="yes|no", boolean=True, default="no", help="yes: return when the operation has ended"
            ),
            TABLE[2],
        ),
        examples=("show operation op-abcdefghijklm wait=yes",),
    ),
    Verb(
        words=("sandbox", "up"),
        summary="start a cluster here",
        text="Starts a message broker, a frontend, a NAS and VM containers on this machine, all on loopback; without "
        "other configuration, commands then speak to the sandbox that was started last.",
        handler="imgstorage.cli.sandboxes:run",
        parameters=(
            DIR, Parameter(name="hosts", value="FILE|guide", help="which hosts it has; guide: those of the user guide",
                default="one NAS, two containers", path=True),
        ),
    ),
    Verb(
        words=("sandbox", "status"),
        summary="what of it runs",
        text="Shows the daemons of the sandbox, and which of them run.",
        handler="imgstorage.cli.sandboxes:run",
        parameters=(DIR,),
    ),
    Verb(
        words=("sandbox", "logs"),
        summary="what its daemons say",
        text="Shows the last lines of its daemons' logs.",
        handler="imgstorage.cli.sandboxes:run",
        arguments=(Argument(name="HOST", help="whose logs; all if none is named", many=True),),
        parameters=(
            DIR, Parameter(name="follow", value="yes|no", boolean=True, default="no", help="yes: go on with new lines"),
        ),
    ),
    Verb(
        words=("sandbox", "exec"),
        summary="run a command on a host",
        text="Runs a command as on a host of the sandbox. What follows HOST is the command, and is not read any "
        "further; parameters stand before HOST.",
        handler="imgstorage.cli.sandboxes:run",
        arguments=(
            Argument(name="HOST", help="the host"),
            Argument(name="COMMAND", help="the command and its arguments", many=True, needed=True),
        ),
        parameters=(DIR,),
        verbatim=True,
        examples=("sandbox exec compute-0-0 qemu-img info /run/disk",),
    ),
    Verb(
        words=("sandbox", "down"),
        summary="stop it, keep its state",
        text="Stops everything of the sandbox. Volumes, mappings and what containers hold stay, for the next up.",
        handler="imgstorage.cli.sandboxes:run",
        parameters=(DIR,),
    ),
    Verb(
        words=("completion",),
        summary="completion for a shell",
        text="Prints a script that makes the shell complete commands, hosts and volumes; to be sourced.",
        handler="imgstorage.cli.completion:script",
        arguments=(Argument(name="SHELL", help="the shell", choices=("bash", "zsh")),),
        examples=("completion bash > ~/.local/share/bash-completion/completions/imgstorage",),
    ),
    Verb(
        words=("_complete",),
        summary="candidates for the last word of a line",
        handler="imgstorage.cli.completion:complete",
        arguments=(Argument(name="WORD", help="the words up to the cursor", many=True),),
        verbatim=True,
        hidden=True,
    ),
)  # fmt: skip

ROCKS_OWN = frozenset({("list", "host")})
"""Commands that a real Rocks has too, under which it shows more than we know."""
