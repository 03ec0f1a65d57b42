#!/bin/sh
# Process 1 of a guest: address, udev, imported pools, the server of ssh, /etc/rc.local if there is one, and the agent.
# The guest's name, hosts file and keys are on its disk from the start; the kernel's command line has lab.address.
# Starting a program takes 30 ms here, so as little as can be is done by programs. Orphans are reaped by the wait at
# the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm /run/lock /run/sshd
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd

read -r words </proc/cmdline
for word in $words; do
    case $word in lab.address=*) address=${word#*=} ;; esac
done
read -r host </etc/hostname
echo "$host" >/proc/sys/kernel/hostname
printf 'link set lo up\naddress add %s dev eth0\nlink set eth0 up\n' "$address" | ip -batch -

/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add --subsystem-match=block --subsystem-match=virtio-ports
udevadm settle --timeout=60

modprobe zfs
if [ -s /etc/zfs/zpool.cache ]; then # as zfs-import-cache, zfs-mount and zfs-volume-wait do
    zpool import -c /etc/zfs/zpool.cache -aN
    zfs mount -a
    zvol_wait
fi
/usr/sbin/sshd
if [ -x /etc/rc.local ]; then /etc/rc.local; fi

while :; do
    python3 -S /opt/imgstorage/tests/lab/inside/agent.py &
    wait
    sleep 1
done
