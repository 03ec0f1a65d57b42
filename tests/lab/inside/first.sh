#!/bin/busybox sh
# The first program of a guest: mounts its root and hands over to init.sh.
# The root is three layers: Debian (read-only, shared by all guests), the project's code (read-only), and above them
# the guest's own disk "state", which keeps what it writes over a reboot and loses what a power cut makes a disk lose.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do
    $b insmod "/modules/$module"
done </modules/order

disk() { # the device whose serial number is $1
    for folder in /sys/block/vd*; do
        if [ "$($b cat "$folder/serial")" = "$1" ]; then echo "/dev/${folder##*/}"; fi
    done
}
$b mount -t erofs -o ro "$(disk root)" /root &&
    $b mount -t erofs -o ro "$(disk code)" /code &&
    $b mount -t ext4 "$(disk state)" /state &&
    $b mkdir -p /state/upper /state/work &&
    $b mount -t overlay -o lowerdir=/code:/root,upperdir=/state/upper,workdir=/state/work overlay /new || {
    echo "the root cannot be mounted"
    $b poweroff -f
}
for name in proc sys dev; do
    $b mount --move "/$name" "/new/$name"
done
exec $b switch_root /new /opt/imgstorage/tests/lab/inside/init.sh
