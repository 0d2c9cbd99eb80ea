// Package kernel keeps capability sets in the kernel: BPF task storage, filled
// at fork by a BPF program. Inheritance is exact, needs no process of ours while
// it happens, and outlives the one that set it up: map and programs are pinned.
//
// bpf/capability.bpf.c is the program; `make generate` compiles it with clang
// into the committed object.
package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"krgimage/services/capability"
)

//go:generate go tool bpf2go -tags linux -target amd64 -go-package kernel -type sets program bpf/capability.bpf.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu

// Table is the kernel's table of sets. Pids are those of this process's
// namespace.
type Table struct {
	sets, lost *ebpf.Map
	// links are held: a link without a pin and a reference detaches its program.
	links []link.Link
	hook  string
}

// Hooks that hand the sets on.
const (
	HookLSM        = "lsm"        // exact, and a fork that can't inherit fails
	HookTracepoint = "tracepoint" // for kernels that load no LSM programs
)

const (
	pinSets = "sets"
	pinLost = "lost"
	pinFork = "fork"
	pinExec = "exec" // only with HookLSM
)

// Open returns the table pinned in dir, a directory on a bpf file system, and
// makes it when there is none yet. Closing it detaches nothing.
func Open(dir string) (*Table, error) {
	t, err := openPinned(dir)
	if err == nil {
		return t, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("capability sets pinned in %s: %w", dir, err)
	}
	if t, err = load(); err != nil {
		return nil, err
	}
	if err := t.pin(dir); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// load puts maps and programs into the kernel and attaches the best hook it
// takes.
func load() (*Table, error) {
	spec, err := loadProgram()
	if err != nil {
		return nil, fmt.Errorf("capability program: %w", err)
	}
	lsm := spec.Copy()
	delete(lsm.Programs, "process_fork")
	t, lsmErr := attach(lsm, HookLSM)
	if lsmErr == nil {
		return t, nil
	}
	delete(spec.Programs, "task_alloc")
	delete(spec.Programs, "exec")
	t, err = attach(spec, HookTracepoint)
	if err != nil {
		return nil, fmt.Errorf("this kernel takes neither program that hands capability sets on (BPF with BTF is needed, and root): %w", errors.Join(lsmErr, err))
	}
	return t, nil
}

func attach(spec *ebpf.CollectionSpec, hook string) (*Table, error) {
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	t := &Table{hook: hook}
	for _, name := range []string{"task_alloc", "exec", "process_fork"} { // the order of the pins
		p := c.Programs[name]
		if p == nil {
			continue
		}
		var l link.Link
		if hook == HookLSM {
			l, err = link.AttachLSM(link.LSMOptions{Program: p})
		} else {
			l, err = link.AttachTracing(link.TracingOptions{Program: p})
		}
		if err != nil {
			t.Close()
			return nil, fmt.Errorf("attach %s: %w", name, err)
		}
		t.links = append(t.links, l)
	}
	t.sets, t.lost = c.DetachMap("table"), c.DetachMap("lost")
	return t, nil
}

// pin makes the table outlive this process. The map comes last: openPinned takes
// it for the sign that all is there.
func (t *Table) pin(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pin capability sets: %w", err)
	}
	for i, l := range t.links {
		name := filepath.Join(dir, []string{pinFork, pinExec}[i])
		_ = os.Remove(name)
		if err := l.Pin(name); err != nil {
			return fmt.Errorf("pin capability program at %s: %w", name, err)
		}
	}
	_ = os.Remove(filepath.Join(dir, pinLost))
	if err := t.lost.Pin(filepath.Join(dir, pinLost)); err != nil {
		return fmt.Errorf("pin capability counters: %w", err)
	}
	if err := t.sets.Pin(filepath.Join(dir, pinSets)); err != nil {
		return fmt.Errorf("pin capability sets: %w", err)
	}
	return nil
}

func openPinned(dir string) (*Table, error) {
	sets, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinSets), nil)
	if err != nil {
		return nil, err
	}
	t := &Table{sets: sets, hook: HookTracepoint}
	if t.lost, err = ebpf.LoadPinnedMap(filepath.Join(dir, pinLost), nil); err != nil {
		t.Close()
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, pinExec)); err == nil {
		t.hook = HookLSM
	}
	return t, nil
}

// Close lets go of the table; what is pinned goes on.
func (t *Table) Close() error {
	var errs []error
	for _, l := range t.links {
		errs = append(errs, l.Close())
	}
	for _, m := range []*ebpf.Map{t.sets, t.lost} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// Hook says how sets are handed on: HookLSM or HookTracepoint.
func (t *Table) Hook() string { return t.hook }

// Lost counts the children that got no sets though their parents had some. With
// HookLSM such a fork has failed.
func (t *Table) Lost() (uint64, error) {
	var perCPU []uint64
	if err := t.lost.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("capability counters: %w", err)
	}
	var n uint64
	for _, c := range perCPU {
		n += c
	}
	return n, nil
}

// Get returns the sets of a process; capability.ErrNoProcess when it has none.
func (t *Table) Get(pidfd int) (capability.Sets, error) {
	var s programSets
	err := t.sets.Lookup(int32(pidfd), &s)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist), errors.Is(err, unix.ESRCH):
		return capability.Sets{}, capability.ErrNoProcess
	case err != nil:
		return capability.Sets{}, fmt.Errorf("read capability sets: %w", err)
	}
	return capability.Sets{
		Permitted: capability.Mask(s.Permitted), Effective: capability.Mask(s.Effective),
		InheritablePermitted: capability.Mask(s.InheritablePermitted), InheritableEffective: capability.Mask(s.InheritableEffective),
	}, nil
}

// Set gives a process sets, whether it had some or not.
func (t *Table) Set(pidfd int, s capability.Sets) error {
	err := t.sets.Put(int32(pidfd), programSets{
		Permitted: uint32(s.Permitted), Effective: uint32(s.Effective),
		InheritablePermitted: uint32(s.InheritablePermitted), InheritableEffective: uint32(s.InheritableEffective),
	})
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, ebpf.ErrKeyNotExist):
		return capability.ErrNoProcess
	case err != nil:
		return fmt.Errorf("write capability sets: %w", err)
	}
	return nil
}
