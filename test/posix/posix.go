// Package posix checks that a directory of a mounted file system behaves as
// POSIX and Linux say: thousands of small facts in tables, from error numbers
// through permissions of several users to time stamps. The test runs it in a
// Linux NFS client over the product's server, and on this machine's own file
// system, which must pass it too: that is the check of the checks.
//
//	posix.go        running checks, acting as other users
//	operations.go   the system calls that take a path, as a table
//	paths.go        what each of them says to bad paths and long names
//	permission.go   who may do what: modes, owners, groups, sticky directories
//	attributes.go   chmod, chown, setuid bits, times, link counts
//	names.go        link, rename, unlink, directories and their listing
//	io.go           open, read, write, truncate, mappings, holes
//
// Known limits of a file system are given as patterns of check names, each with
// its reason. A check that is a known limit and passes is an error as well: the
// documentation would be wrong.
package posix

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Result is what a run has found.
type Result struct {
	Passed  int
	Failed  []string // unexpected failures: check, what was seen, what was wanted
	Limited []string // failures that are known limits
	Healed  []string // known limits that no check fails any more
}

// Limit is a known difference of a file system.
type Limit struct {
	Check string // pattern of check names, as in path.Match but with / like any letter
	Why   string
}

// check is one group of facts. It gets an empty directory with mode 0755.
type check struct {
	name string
	run  func(*T)
}

// T is what a check works with.
type T struct {
	dir    string
	name   string
	report func(name, problem string) // problem "" for a fact that holds
}

// Run runs all checks in dir, which must be root's to write, as root. A nil out
// is silent.
func Run(dir string, limits []Limit, out io.Writer) Result {
	var r Result
	hit := make([]bool, len(limits))
	report := func(name, problem string) {
		if problem == "" {
			r.Passed++
			return
		}
		line := name + ": " + problem
		for i, l := range limits {
			flat := strings.NewReplacer("/", "|")
			if ok, _ := path.Match(flat.Replace(l.Check), flat.Replace(name)); ok {
				hit[i] = true
				r.Limited = append(r.Limited, line)
				return
			}
		}
		r.Failed = append(r.Failed, line)
		if out != nil {
			fmt.Fprintln(out, "FAIL", line)
		}
	}
	unix.Umask(0)
	for i, c := range slices.Concat(pathChecks(), permissionChecks(), attributeChecks(), nameChecks(), ioChecks()) {
		d := filepath.Join(dir, fmt.Sprintf("c%d", i))
		if err := os.Mkdir(d, 0o755); err != nil {
			report(c.name, err.Error())
			continue
		}
		c.run(&T{dir: d, name: c.name, report: report})
		if err := os.RemoveAll(d); err != nil {
			report(c.name+"/clean up", err.Error())
		}
	}
	for i, l := range limits {
		if !hit[i] {
			r.Healed = append(r.Healed, l.Check)
		}
	}
	return r
}

// path names a file in the check's directory.
func (t *T) path(name string) string { return filepath.Join(t.dir, name) }

// sub gives a check of its own, with its own directory, to a row of a table.
func (t *T) sub(name string, f func(*T)) {
	d := filepath.Join(t.dir, strings.Map(func(r rune) rune {
		if r == '/' {
			return '|'
		}
		return r
	}, "sub "+name))
	s := &T{dir: d, name: t.name + "/" + name, report: t.report}
	if err := os.Mkdir(d, 0o755); err != nil {
		t.report(s.name, err.Error())
		return
	}
	f(s)
	if err := os.RemoveAll(d); err != nil {
		t.report(s.name+"/clean up", err.Error())
	}
}

// errno says that an operation must end with one of the errors; 0 is success.
func (t *T) errno(what string, err error, want ...unix.Errno) {
	got := unix.Errno(0)
	if err != nil && !errors.As(err, &got) {
		t.report(t.name+"/"+what, err.Error())
		return
	}
	if slices.Contains(want, got) {
		t.report(t.name+"/"+what, "")
		return
	}
	var names []string
	for _, w := range want {
		names = append(names, errnoName(w))
	}
	t.report(t.name+"/"+what, fmt.Sprintf("got %s, want %s", errnoName(got), strings.Join(names, " or ")))
}

// ok says that an operation must succeed.
func (t *T) ok(what string, err error) bool {
	t.errno(what, err, 0)
	return err == nil
}

// is compares.
func (t *T) is(what string, got, want any) {
	if reflect.DeepEqual(got, want) {
		t.report(t.name+"/"+what, "")
		return
	}
	t.report(t.name+"/"+what, fmt.Sprintf("got %v, want %v", got, want))
}

// yes says that something must hold.
func (t *T) yes(what string, holds bool) { t.is(what, holds, true) }

// must is for the set-up of a check: the facts that follow mean nothing without.
func (t *T) must(err error) {
	if err != nil {
		t.report(t.name+"/set-up", err.Error())
	}
}

func errnoName(e unix.Errno) string {
	if e == 0 {
		return "success"
	}
	if n := unix.ErrnoName(e); n != "" {
		return n
	}
	return e.Error()
}

// identity is who does something.
type identity struct {
	uid, gid int
	groups   []uint32
}

var (
	alice = identity{uid: 64001, gid: 64001}
	bob   = identity{uid: 64002, gid: 64002}
)

// as runs f as another user. Linux has identities per thread; the thread ends
// with f.
func (t *T) as(id identity, f func()) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := become(id)
		if err == nil {
			f()
		}
		done <- err
	}()
	t.must(<-done)
}

// become changes the calling thread's identity alone: unix.Setresuid would
// change the process's.
func become(id identity) error {
	var groups unsafe.Pointer
	if len(id.groups) > 0 {
		groups = unsafe.Pointer(&id.groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(id.groups)), uintptr(groups), 0); e != 0 {
		return e
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id.gid), uintptr(id.gid), uintptr(id.gid)); e != 0 {
		return e
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id.uid), uintptr(id.uid), uintptr(id.uid)); e != 0 {
		return e
	}
	return nil
}

// stat and lstat are for facts about a file that is there.
func (t *T) stat(p string) (st unix.Stat_t)  { t.must(unix.Stat(p, &st)); return st }
func (t *T) lstat(p string) (st unix.Stat_t) { t.must(unix.Lstat(p, &st)); return st }

// file makes a file with a content and a mode.
func (t *T) file(name, content string, mode uint32) string {
	p := t.path(name)
	t.must(os.WriteFile(p, []byte(content), 0o600))
	t.must(unix.Chmod(p, mode))
	return p
}

// mkdir makes a directory.
func (t *T) mkdir(name string, mode uint32) string {
	p := t.path(name)
	t.must(unix.Mkdir(p, mode))
	return p
}

// kinds of files that a test makes, by name.
var kinds = []string{"file", "directory", "symlink", "fifo", "socket", "block", "char"}

// make makes a file of a kind.
func (t *T) make(kind, p string) error {
	switch kind {
	case "file":
		return unix.Mknod(p, unix.S_IFREG|0o644, 0)
	case "directory":
		return unix.Mkdir(p, 0o755)
	case "symlink":
		return unix.Symlink("target", p)
	case "fifo":
		return unix.Mkfifo(p, 0o644)
	case "socket":
		return unix.Mknod(p, unix.S_IFSOCK|0o644, 0)
	case "block":
		return unix.Mknod(p, unix.S_IFBLK|0o644, int(unix.Mkdev(240, 9)))
	case "char":
		return unix.Mknod(p, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3)))
	}
	panic("no kind " + kind)
}

var kindBits = map[string]uint32{
	"file": unix.S_IFREG, "directory": unix.S_IFDIR, "symlink": unix.S_IFLNK, "fifo": unix.S_IFIFO,
	"socket": unix.S_IFSOCK, "block": unix.S_IFBLK, "char": unix.S_IFCHR,
}
