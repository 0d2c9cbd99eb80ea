package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/node/coldplug"
)

// guestDone is what the guest prints on its console when all went well; package
// test waits for it.
const guestDone = "nfsload: guest done"

// guest is the init of a virtual machine with a disk, /dev/vda, that has an ext4
// file system: it serves that by this server and by the kernel's, to itself.
func guest(ctx context.Context, out io.Writer) error {
	for _, m := range []struct{ fs, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, m.at, m.fs, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	modules, err := coldplug.Open("/")
	if err != nil {
		return err
	}
	for _, name := range []string{"virtio_blk", "crc32c_generic", "ext4", "nfsd"} {
		if err := modules.Load(name); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	const dir = "/srv"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/vda", dir, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount the disk: %w", err)
	}
	if err := loopback(); err != nil {
		return err
	}
	if err := portmapper(ctx); err != nil {
		return err
	}
	fmt.Fprintln(out, "nfsload: making the files")
	if err := prepare(dir, guestSizes); err != nil {
		return err
	}
	unix.Sync()
	kernel, err := startKernel(dir)
	if err != nil {
		return fmt.Errorf("the kernel's server: %w", err)
	}
	own, err := startOwn(ctx, "own", dir, "22049")
	if err != nil {
		return err
	}
	only := ""
	if args, err := os.ReadFile("/proc/cmdline"); err == nil {
		for arg := range strings.FieldsSeq(string(args)) {
			if rest, found := strings.CutPrefix(arg, "nfsload="); found {
				only = rest
			}
		}
	}
	if err := table(ctx, out, dir, []*target{own.target, kernel}, guestSizes, 2, only); err != nil {
		return err
	}
	own.stop()
	fmt.Fprintln(out, guestDone)
	powerOff(out)
	return nil
}

func powerOff(out io.Writer) {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(out, "power off:", err)
	}
}

// Export flags of nfsd (include/uapi/linux/nfsd/export.h).
const (
	expInsecurePort = 0x0002
	expNoSubtree    = 0x0400
	expFSID         = 0x2000
)

// startKernel starts the kernel's server on a directory, as exportfs, mountd and
// rpc.nfsd do, with the default "sync".
func startKernel(dir string) (*target, error) {
	if err := unix.Mount("nfsd", "/proc/fs/nfsd", "nfsd", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("mount nfsd: %w", err)
	}
	const never = 0x7fffffff
	for _, w := range []struct{ file, text string }{
		{"/proc/net/rpc/auth.unix.ip/channel", fmt.Sprintf("nfsd 127.0.0.1 %d all\n", never)},
		{"/proc/fs/nfsd/versions", "+3 -4\n"},
		{"/proc/fs/nfsd/portlist", "tcp 2049\n"},
		{"/proc/fs/nfsd/threads", "8\n"},
		{"/proc/net/rpc/nfsd.export/channel", fmt.Sprintf("all %s %d %d 65534 65534 1\n", dir, never, expInsecurePort|expNoSubtree|expFSID)},
		{"/proc/net/rpc/nfsd.fh/channel", fmt.Sprintf(`all 1 \x01000000 %d %s`+"\n", never, dir)},
	} {
		if err := os.WriteFile(w.file, []byte(w.text), 0); err != nil {
			return nil, fmt.Errorf("%w (%q)", err, w.text)
		}
	}
	// The file gives its answer to a question that was written through the same
	// opening.
	f, err := os.OpenFile("/proc/fs/nfsd/filehandle", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "all %s 64\n", dir); err != nil {
		return nil, fmt.Errorf("root handle: %w", err)
	}
	answer := make([]byte, 256)
	n, err := f.ReadAt(answer, 0)
	if n == 0 {
		return nil, fmt.Errorf("root handle: %w", err)
	}
	root, err := hex.DecodeString(strings.TrimPrefix(strings.TrimSpace(string(answer[:n])), `\x`))
	if err != nil {
		return nil, fmt.Errorf("root handle %q: %w", answer[:n], err)
	}
	return &target{name: "knfsd", nfs: "127.0.0.1:2049", root: root}, nil
}

// portmapper stands in for rpcbind, without which the kernel's server doesn't
// start: it says yes to every registration and forgets it.
func portmapper(ctx context.Context) error {
	ln, err := net.Listen("tcp", "127.0.0.1:111")
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				r := bufio.NewReader(nc)
				var head [8]byte // mark, xid
				for {
					if _, err := io.ReadFull(r, head[:]); err != nil {
						return
					}
					n := int(binary.BigEndian.Uint32(head[:]) &^ (1 << 31))
					if _, err := r.Discard(n - 4); err != nil {
						return
					}
					e := enc{}
					e.u32(1<<31 | 28)
					e.u32(binary.BigEndian.Uint32(head[4:]))
					for _, v := range []uint32{1, 0, 0, 0, 0, 1} { // accepted, no verifier, success, true
						e.u32(v)
					}
					if _, err := nc.Write(e.b); err != nil {
						return
					}
				}
			}()
		}
	}()
	return nil
}
