#!/bin/busybox sh
# The first program of a virtual machine that runs from a volume: mounts the volume's file system, writes files to it,
# flushes each, and says so on the console, until a line comes from there; then it turns the machine off.
b=/bin/busybox
slots=16
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do
    $b insmod "/modules/$module"
done </modules/order
$b mount -t ext4 /dev/vda /root || {
    echo "vm: no file system"
    $b poweroff -f
}
echo "vm: up"
($b head -n 1 </dev/ttyS0 >/stop) &
number=0
while [ ! -s /stop ]; do
    number=$((number + 1))
    file=/root/data/$((number % slots))
    $b dd if=/dev/urandom of=$file.new bs=64k count=1 conv=fsync 2>/dev/null &&
        $b mv $file.new $file && $b sync && sum=$($b sha256sum <$file) || {
        echo "vm: failed at $number"
        break
    }
    echo "vm: wrote $((number % slots)) ${sum%% *}"
done
$b umount /root && echo "vm: off"
$b poweroff -f
