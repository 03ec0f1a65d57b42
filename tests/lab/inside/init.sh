#!/bin/sh
# Process 1 of a guest: what a guest is told on the kernel's command line (lab.host, lab.address, lab.hosts) becomes
# its name, address and hosts file; then udev, imported pools, the server of ssh, /etc/rc.local if there is one, and
# the agent. Orphans are reaped by the wait at the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm /run/lock /run/sshd
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd

told() { tr ' ' '\n' </proc/cmdline | sed -n "s/^lab\.$1=//p"; }
host=$(told host)
echo "$host" >/proc/sys/kernel/hostname
ip link set lo up
ip address add "$(told address)" dev eth0
ip link set eth0 up

if [ ! -e /etc/iscsi/initiatorname.iscsi ]; then # the first boot
    echo "$host" >/etc/hostname
    {
        echo "127.0.0.1 localhost"
        told hosts | tr ',' '\n' | sed 's/:/ /'
    } >/etc/hosts
    echo "$host" | md5sum | cut -c1-32 >/etc/machine-id
    printf '%b' "$(echo "$host" | md5sum | sed -E 's/^(..)(..)(..)(..).*/\\x\1\\x\2\\x\3\\x\4/')" >/etc/hostid
    ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
    echo "InitiatorName=iqn.2004-10.lab.imgstorage:$host" >/etc/iscsi/initiatorname.iscsi
fi

/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add --subsystem-match=block --subsystem-match=virtio-ports --subsystem-match=misc
udevadm settle --timeout=30

modprobe zfs
if [ -s /etc/zfs/zpool.cache ]; then # as zfs-import-cache, zfs-mount and zfs-volume-wait do
    zpool import -c /etc/zfs/zpool.cache -aN
    zfs mount -a
    zvol_wait
fi
/usr/sbin/sshd
if [ -x /etc/rc.local ]; then /etc/rc.local; fi

while :; do
    python3 /opt/imgstorage/tests/lab/inside/agent.py &
    wait
    sleep 1
done
