#!/usr/bin/env bash
# Run inside new user, mount, network, process and IPC namespaces by locked_down.py:
#     locked_down.sh ROOT MEMORY SECONDS PYTHON FOLDER...    the program on stdin, a tar of /locked on stdout
# ROOT becomes a small file system in memory with the FOLDERs in it, read-only; everything else goes out of sight.
set -euo pipefail
root=$1 memory=$2 seconds=$3 python=$4
shift 4
export PATH=/usr/bin:/usr/sbin:/bin:/sbin

mount -t tmpfs -o size=64m,mode=755 none "$root"
mkdir -p "$root"/{locked/files,locked/out,old,dev}
for folder in "$@"; do
    if [ -L "$folder" ]; then
        cp -P "$folder" "$root$folder" # /lib and its like on a system where they are part of /usr
        continue
    fi
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
    mount -o remount,bind,ro,nosuid,nodev "$root$folder"
done
# Without the system's fonts matplotlib has its own, which are the same everywhere and found in no time.
[ ! -d "$root/usr/share/fonts" ] || mount -t tmpfs -o ro none "$root/usr/share/fonts"
for device in null urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
cp "$(dirname "${BASH_SOURCE[0]}")/no_processes.py" "$root/locked/out/"
cat >"$root/locked/out/program.py"

cd "$root"
pivot_root . old
cd /locked/files
# umount(8) wants /proc, which is not there: 2 is MNT_DETACH.
"$python" -I -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).umount2(b"/old", 2))'
rmdir /old
status=0
env -i PATH=/usr/bin HOME=/locked/files TMPDIR=/locked/files MPLBACKEND=Agg OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
    setpriv --bounding-set=-all --inh-caps=-all --no-new-privs \
    prlimit --as="$memory" --cpu="$seconds" --fsize=33554432 --nofile=256 --core=0 \
    "$python" -I -B /locked/out/no_processes.py /locked/out/program.py >/locked/out/stdout 2>/locked/out/stderr || status=$?
echo $status >/locked/out/status || true # the program may have filled the file system
tar -C /locked -c files out
