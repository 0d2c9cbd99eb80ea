// Package guard makes the kernel refuse, with EAGAIN, a fork or thread that would
// get a process id outside of its PID namespace's range. It is what holds when
// the keeper (package pids) doesn't get to run.
//
// bpf/guard.bpf.c is the program; `make generate` compiles it with clang into the
// committed object. It is pinned and goes on without the process that loaded it.
package guard

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"krgimage/services/pids"
)

//go:generate go tool bpf2go -tags linux -target amd64 -go-package guard -type span program bpf/guard.bpf.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu

// Guard holds PID namespaces in their ranges.
type Guard struct {
	spans *ebpf.Map
	links []link.Link
}

// ErrUnsupported says that this kernel loads no LSM programs.
var ErrUnsupported = errors.New("this kernel loads no BPF LSM programs (bpf must be in its lsm= list)")

// Open returns the guard pinned in dir, a directory on a bpf file system, and
// loads it when there is none yet.
func Open(dir string) (*Guard, error) {
	if m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "spans"), nil); err == nil {
		return &Guard{spans: m}, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("process id guard pinned in %s: %w", dir, err)
	}
	var objects programObjects
	if err := loadProgramObjects(&objects, nil); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	defer objects.programPrograms.Close()
	g := &Guard{spans: objects.Spans}
	if err := g.attach(&objects, dir); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

func (g *Guard) attach(o *programObjects, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pin process id guard: %w", err)
	}
	given, err := link.AttachTracing(link.TracingOptions{Program: o.Given})
	if err != nil {
		return fmt.Errorf("process id guard: %w", err)
	}
	g.links = append(g.links, given)
	check, err := link.AttachLSM(link.LSMOptions{Program: o.Check})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	g.links = append(g.links, check)
	for i, name := range []string{"given", "check"} {
		path := filepath.Join(dir, name)
		_ = os.Remove(path) // left by one that died on the way here
		if err := g.links[i].Pin(path); err != nil {
			return fmt.Errorf("pin process id guard: %w", err)
		}
	}
	if err := g.spans.Pin(filepath.Join(dir, "spans")); err != nil {
		return fmt.Errorf("pin process id guard: %w", err)
	}
	return nil
}

// Close lets go of the guard; what is pinned goes on.
func (g *Guard) Close() error {
	var errs []error
	for _, l := range g.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(append(errs, g.spans.Close())...)
}

// Hold keeps the PID namespace with that inode number (of /proc/PID/ns/pid) in
// the range. Its allocator must be there already.
func (g *Guard) Hold(namespace uint32, r pids.Range) error {
	return g.put(namespace, programSpan{
		First: uint32(r.First), Reserve: uint32(r.End - pids.Reserve), End: uint32(r.End), Allowed: pids.Reserve / 4,
	})
}

func (g *Guard) put(namespace uint32, s programSpan) error {
	if err := g.spans.Put(namespace, s); err != nil {
		return fmt.Errorf("hold process ids in range: %w", err)
	}
	return nil
}

// Release lets a namespace go.
func (g *Guard) Release(namespace uint32) error {
	if err := g.spans.Delete(namespace); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("release process ids: %w", err)
	}
	return nil
}

// Count is what happened in a namespace.
type Count struct {
	Refused uint32 // forks and threads that failed with EAGAIN
	Reserve uint32 // ids given from the reserve since the last Recount
	Outside uint32 // ids outside of the range: given before Hold
}

// Count reads a namespace's counts.
func (g *Guard) Count(namespace uint32) (Count, error) {
	var s programSpan
	if err := g.spans.Lookup(namespace, &s); err != nil {
		return Count{}, fmt.Errorf("process id guard: %w", err)
	}
	return Count{Refused: s.Refused, Reserve: s.Given, Outside: s.Outside}, nil
}

// Recount tells the guard how many ids of the reserve are still in use, from the
// names in proc, a proc file system of the namespace: it has only seen them be
// given. Without it, forks fail for good after some time on a full node.
func (g *Guard) Recount(namespace uint32, proc string) error {
	var s programSpan
	if err := g.spans.Lookup(namespace, &s); err != nil {
		return fmt.Errorf("process id guard: %w", err)
	}
	if s.Given == 0 {
		return nil
	}
	used := uint32(0)
	for id := s.Reserve; id < s.End; id++ {
		// A thread's directory exists though it isn't listed.
		if _, err := os.Lstat(filepath.Join(proc, strconv.Itoa(int(id)))); err == nil {
			used++
		}
	}
	// An id given meanwhile is counted as used next time; the reserve is four
	// times what is allowed.
	s.Given = used
	return g.put(namespace, s)
}

// Namespace is the inode number of a process's PID namespace.
func Namespace(proc string) (uint32, error) {
	text, err := os.Readlink(filepath.Join(proc, "ns/pid"))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(text, "pid:["), "]"), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("namespace %q: %w", text, err)
	}
	return uint32(n), nil
}
