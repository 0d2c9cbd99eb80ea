package trial

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// Install is what a trial needs from the machine it runs on.
type Install struct {
	QEMU string // qemu-system-x86_64
	Code string // OVMF firmware; only with UEFI
	Vars string // its empty variable store, copied for each machine
}

// ErrMissing: a program or file of a Debian package is not there.
var ErrMissing = errors.New("not installed")

// Find looks for QEMU, its iPXE ROM or OVMF.
func Find(uefi bool) (Install, error) { return find("/", exec.LookPath, uefi) }

func find(root string, lookPath func(string) (string, error), uefi bool) (Install, error) {
	var in Install
	var err error
	if in.QEMU, err = lookPath("qemu-system-x86_64"); err != nil {
		return in, missing("qemu-system-x86_64", "qemu-system-x86")
	}
	if !uefi {
		// Only looked at: QEMU finds its ROMs itself, but its error when one is
		// missing names no package.
		_, err := first(root, "usr/lib/ipxe/qemu/pxe-virtio.rom", "usr/share/qemu/pxe-virtio.rom", "usr/local/share/qemu/pxe-virtio.rom")
		if err != nil {
			return in, missing("the iPXE ROM of QEMU (pxe-virtio.rom)", "ipxe-qemu")
		}
		return in, nil
	}
	// Debian 13 has only the 4 MB builds; code and variables must match.
	for _, size := range []string{"_4M", ""} {
		in.Code, err = first(root, "usr/share/OVMF/OVMF_CODE"+size+".fd")
		if err == nil {
			in.Vars, err = first(root, "usr/share/OVMF/OVMF_VARS"+size+".fd")
		}
		if err == nil {
			return in, nil
		}
	}
	return in, missing("the UEFI firmware OVMF", "ovmf")
}

func first(root string, paths ...string) (string, error) {
	for _, p := range paths {
		p = filepath.Join(root, p)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fs.ErrNotExist
}

func missing(what, pkg string) error {
	return fmt.Errorf("%s is %w: install the Debian package %s (apt install %s)", what, ErrMissing, pkg, pkg)
}

// Descriptors that a QEMU inherits: its ends of two socket pairs.
const (
	serialFD = 3
	qmpFD    = 4
)

// hardware is what a QEMU is told about its machine.
type hardware struct {
	Machine
	Install
	accel  []string
	memory int64  // bytes
	cpus   int    //
	wire   string // unix socket of the switch port
	vars   string // this machine's copy of the UEFI variables; empty: BIOS
}

// args is QEMU's command line. Nothing is inherited from the user's or the
// system's QEMU configuration, and there is no device that isn't named here.
func (h hardware) args() []string {
	a := []string{"-name", escape(h.Hostname), "-nodefaults", "-no-user-config", "-display", "none"}
	nic := "virtio-net-pci,netdev=n0,bootindex=1,mac=" + h.MAC.String()
	if h.vars == "" {
		// Without graphics SeaBIOS talks to the serial line, and so does iPXE.
		a = append(a, "-machine", "pc,graphics=off")
	} else {
		a = append(a, "-machine", "q35",
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+escape(h.Code),
			"-drive", "if=pflash,unit=1,format=raw,file="+escape(h.vars))
		// Without QEMU's ROM, which is iPXE, OVMF uses its own PXE stack as
		// real boards do, and loads iPXE by TFTP.
		nic += ",romfile="
	}
	a = append(a, h.accel...)
	return append(a,
		"-m", strconv.FormatInt(h.memory>>20, 10),
		"-smp", strconv.Itoa(h.cpus),
		"-rtc", "base=utc",
		// When nothing answers the firmware gives up; start over after 3 s.
		"-boot", "order=n,reboot-timeout=3000",
		"-netdev", "stream,id=n0,server=off,addr.type=unix,addr.path="+escape(h.wire),
		"-device", nic,
		"-object", "rng-random,id=rng0,filename=/dev/urandom",
		"-device", "virtio-rng-pci,rng=rng0",
		"-chardev", "socket,id=serial0,fd="+strconv.Itoa(serialFD),
		"-serial", "chardev:serial0",
		"-chardev", "socket,id=qmp0,fd="+strconv.Itoa(qmpFD),
		"-mon", "chardev=qmp0,mode=control",
	)
}
