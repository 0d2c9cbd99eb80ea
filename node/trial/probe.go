package trial

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Accel is how QEMU runs the guests' code.
type Accel struct {
	Name   string        `json:"name"` // kvm or tcg
	Args   []string      `json:"args"` // for QEMU: -accel and -cpu
	Reason string        `json:"reason"`
	Took   time.Duration `json:"-"` // the probe guest with this accelerator
}

var (
	kvm = Accel{Name: "kvm", Args: []string{"-accel", "kvm", "-cpu", "host"}}
	// The plain model: QEMU's "max" makes Debian's kernel use five-level page
	// tables, which TCG walks in software. rdrand fills the guest's entropy
	// pool before any driver is loaded.
	tcg = Accel{Name: "tcg", Args: []string{"-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"}}
)

// Time limits of the probe guest. Where KVM works it needs some 0.2 s; a nested
// or emulated KVM that exists but crawls is worse than TCG.
const (
	kvmLimit = 5 * time.Second
	tcgLimit = 60 * time.Second
)

// Hardware says whether the machine's processor runs the guests' code, rather
// than an emulation of one.
func (a Accel) Hardware() bool { return a.Name == kvm.Name }

// Probe finds the accelerator by running a guest that goes through the
// firmware, protected mode, paging and long mode. That /dev/kvm can be opened
// says too little: it may hang there, or take minutes.
func Probe(ctx context.Context, qemu string) (Accel, error) {
	slow := tcg
	var err error
	if slow.Took, err = runProbe(ctx, qemu, tcg.Args, tcgLimit); err != nil {
		return Accel{}, fmt.Errorf("QEMU can't run a guest: %w", err)
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		slow.Reason = "there is no /dev/kvm (is virtualisation on in the firmware, or nested in the hypervisor?)"
		return slow, nil
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		slow.Reason = fmt.Sprintf("/dev/kvm can't be opened: %v (join the group kvm)", err)
		return slow, nil
	} else {
		f.Close()
	}
	fast := kvm
	fast.Took, err = runProbe(ctx, qemu, kvm.Args, kvmLimit)
	return choose(slow, fast, err), ctx.Err()
}

// choose decides between TCG and KVM by what their probe guests did.
func choose(slow, fast Accel, kvmErr error) Accel {
	switch {
	case errors.Is(kvmErr, context.DeadlineExceeded):
		slow.Reason = fmt.Sprintf("KVM is there but did not finish the probe guest in %s (without it: %.1f s)", kvmLimit, slow.Took.Seconds())
	case kvmErr != nil:
		slow.Reason = fmt.Sprintf("KVM is there but doesn't work: %v", kvmErr)
	case fast.Took > slow.Took+time.Second:
		slow.Reason = fmt.Sprintf("KVM is there but slower than emulation: %.1f s against %.1f s for the probe guest", fast.Took.Seconds(), slow.Took.Seconds())
	default:
		fast.Reason = fmt.Sprintf("a probe guest ran with it in %.1f s", fast.Took.Seconds())
		return fast
	}
	return slow
}

// probeExit is the exit status of a QEMU whose guest wrote 0x10 to the debug
// exit port: the value doubled plus one (QEMU hw/misc/debugexit.c).
const probeExit = 0x10<<1 | 1

// runProbe runs the probe guest and returns how long it took.
func runProbe(ctx context.Context, qemu string, accel []string, limit time.Duration) (time.Duration, error) {
	dir, err := os.MkdirTemp("", "krgimage-probe-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	floppy := filepath.Join(dir, "probe.img")
	if err := os.WriteFile(floppy, probeSector(), 0o600); err != nil {
		return 0, err
	}
	if err := os.Truncate(floppy, 1440<<10); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	args := append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "32"}, accel...)
	args = append(args, "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
		"-drive", "if=floppy,format=raw,readonly=on,file="+escape(floppy), "-boot", "a")
	cmd := exec.Command(qemu, args...)
	var stderr tail
	cmd.Stderr = &stderr
	start := time.Now()
	p, err := startChild(cmd)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", qemu, err)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
		<-p.done
		return 0, ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) && exit.ExitCode() == probeExit {
		return time.Since(start), nil
	}
	return 0, fmt.Errorf("%s%s", exitText(p.err), stderr.hint())
}

// probeSector is a boot sector that builds a page table, enters long mode and
// tells QEMU to exit.
func probeSector() []byte {
	code := []byte{
		0xfa,       // cli
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0x8e, 0xc0, // mov es, ax
		0x66, 0xbf, 0x00, 0x10, 0x00, 0x00, // mov edi, 0x1000
		0x0f, 0x22, 0xdf, // mov cr3, edi
		0x66, 0x31, 0xc0, // xor eax, eax
		0xb9, 0x00, 0x0c, // mov cx, 0xc00
		0xfc,             // cld
		0x66, 0xf3, 0xab, // rep stosd: three empty page tables
		0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, // mov word [0x1000], 0x2003
		0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, // mov word [0x2000], 0x3003
		0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, // mov word [0x3000], 0x0083: 2 MiB at 0
		0x0f, 0x20, 0xe0, // mov eax, cr4
		0x0c, 0x20, // or al, 0x20: PAE
		0x0f, 0x22, 0xe0, // mov cr4, eax
		0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, // mov ecx, 0xc0000080: EFER
		0x0f, 0x32, // rdmsr
		0x80, 0xcc, 0x01, // or ah, 1: LME
		0x0f, 0x30, // wrmsr
		0x0f, 0x01, 0x16, 0x6c, 0x7c, // lgdt [gdtr]
		0x0f, 0x20, 0xc0, // mov eax, cr0
		0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, // or eax, 0x80000001: PG, PE
		0x0f, 0x22, 0xc0, // mov cr0, eax
		0xea, 0x57, 0x7c, 0x08, 0x00, // jmp 8:long
		// long (0x7c57), 64-bit code:
		0xb0, 0x10, // mov al, 0x10
		0xe6, 0xf4, // out 0xf4, al
		0xf4, // hlt
		// gdt (0x7c5c):
		0, 0, 0, 0, 0, 0, 0, 0,
		0, 0, 0, 0, 0x00, 0x9a, 0x20, 0x00, // 64-bit code segment
		// gdtr (0x7c6c):
		0x0f, 0x00, 0x5c, 0x7c, 0x00, 0x00,
	}
	sector := make([]byte, 512)
	copy(sector, code)
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

// exitText says how a process ended.
func exitText(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return "QEMU was ended by signal " + ws.Signal().String()
		}
		return fmt.Sprintf("QEMU ended with status %d", exit.ExitCode())
	}
	if err != nil {
		return err.Error()
	}
	return "QEMU ended"
}

// escape doubles commas: QEMU ends an option's value at a single one.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
