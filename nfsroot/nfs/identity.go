package nfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nobody is the uid and gid of callers without credentials and of squashed root.
const nobody = 65534

// maxThreads bounds the threads that act as other users.
const maxThreads = 64

// identity is who a request acts as.
type identity struct {
	uid, gid uint32
	groups   string // supplementary groups, four bytes each in machine order; comparable
}

func (id identity) root() bool { return id.uid == 0 }

func (id identity) in(gid uint32) bool {
	if id.gid == gid {
		return true
	}
	for g := id.groups; len(g) >= 4; g = g[4:] {
		if binary.NativeEndian.Uint32([]byte(g[:4])) == gid {
			return true
		}
	}
	return false
}

// squash maps root to nobody, as an export with RootSquash demands.
func (id identity) squash() identity {
	if id.uid == 0 {
		id.uid = nobody
	}
	if id.gid == 0 {
		id.gid = nobody
	}
	var groups []byte
	for g := id.groups; len(g) >= 4; g = g[4:] {
		v := binary.NativeEndian.Uint32([]byte(g[:4]))
		if v == 0 {
			v = nobody
		}
		groups = binary.NativeEndian.AppendUint32(groups, v)
	}
	id.groups = string(groups)
	return id
}

// threadPool runs functions as other users. Linux keeps credentials per thread,
// and the raw system calls set them for the calling thread alone; libc and Go's
// syscall package set them for the whole process, which is not wanted here. A
// thread of the pool is locked to its goroutine, has its own umask (0), keeps
// the identity it had last, and ends with its goroutine: it never runs other Go
// code.
type threadPool struct {
	slots chan struct{} // one token a running job
	own   identity      // the process's
	umask uint32        // the process's

	mu     sync.Mutex
	idle   []*thread // guarded by mu; most recently used last
	closed bool      // guarded by mu
}

type thread struct {
	jobs chan *job
	id   identity
}

type job struct {
	id    identity
	fn    func()
	done  chan struct{}
	err   error
	panic any
}

func newThreadPool(size int) *threadPool {
	p := &threadPool{slots: make(chan struct{}, size), umask: umask()}
	p.own.uid, p.own.gid = uint32(os.Geteuid()), uint32(os.Getegid())
	groups, err := os.Getgroups()
	if err != nil {
		groups = nil
	}
	for _, g := range groups {
		p.own.groups += string(binary.NativeEndian.AppendUint32(nil, uint32(g)))
	}
	return p
}

// umask reads the process's umask, which umask(2) can't without changing it;
// 0777, which no mode fits, when that fails. It asks for the calling thread: a
// thread of a pool may be the one that stands for the process.
func umask() uint32 {
	data, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0o777
	}
	for line := range strings.Lines(string(data)) {
		if rest, found := strings.CutPrefix(line, "Umask:"); found {
			if v, err := strconv.ParseUint(strings.TrimSpace(rest), 8, 32); err == nil {
				return uint32(v)
			}
		}
	}
	return 0o777
}

// run calls fn on a thread that has the identity, and waits for it. The error
// says that the identity could not be taken and fn did not run.
func (p *threadPool) run(id identity, fn func()) error {
	p.slots <- struct{}{}
	t := p.pick(id)
	j := &job{id: id, fn: fn, done: make(chan struct{})}
	t.jobs <- j
	<-j.done
	if j.err == nil {
		p.mu.Lock()
		if p.closed {
			close(t.jobs)
		} else {
			p.idle = append(p.idle, t)
		}
		p.mu.Unlock()
	}
	<-p.slots
	if j.panic != nil {
		panic(j.panic)
	}
	return j.err
}

// pick takes an idle thread, best one that has the identity already, or starts
// a new one.
func (p *threadPool) pick(id identity) *thread {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		t := &thread{jobs: make(chan *job)}
		go t.loop()
		return t
	}
	best := n - 1
	for i := n - 1; i >= 0; i-- {
		if p.idle[i].id == id {
			best = i
			break
		}
	}
	t := p.idle[best]
	p.idle = append(p.idle[:best], p.idle[best+1:]...)
	return t
}

// here runs fn with the identity on the calling goroutine's own thread, and gives
// the thread the server's identity back: handing fn to another thread and waiting
// for it takes several times as long. fn runs with the process's umask.
func (p *threadPool) here(id identity, fn func() error) error {
	runtime.LockOSThread()
	err := become(id)
	if err == nil {
		defer p.back()
		return fn()
	}
	p.back()
	return err
}

// back gives the calling thread the server's identity. A thread that can't have
// it stays locked and ends with its goroutine, which must not go on.
func (p *threadPool) back() {
	if err := become(p.own); err != nil {
		panic(fmt.Sprintf("taking the server's own identity back: %v", err))
	}
	runtime.UnlockOSThread()
}

// close ends the idle threads, and the busy ones when they are done.
func (p *threadPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, t := range p.idle {
		close(t.jobs)
	}
	p.idle = nil
}

// check takes a foreign identity and its own back, to find out whether it may.
func (p *threadPool) check() error {
	var groups [4]byte
	binary.NativeEndian.PutUint32(groups[:], nobody)
	if err := p.run(identity{uid: nobody, gid: nobody, groups: string(groups[:])}, func() {}); err != nil {
		return err
	}
	return p.run(identity{}, func() {})
}

func (t *thread) loop() {
	// Never unlocked: the runtime ends the thread together with the goroutine,
	// so its identity can't leak into other code.
	runtime.LockOSThread()
	// The file system context (umask, working directory) is shared by all
	// threads of a process until unshared.
	broken := unix.Unshare(unix.CLONE_FS)
	if broken == nil {
		unix.Umask(0)
	}
	started := false
	for j := range t.jobs {
		if broken == nil && (!started || t.id != j.id) {
			started = true
			t.id = j.id
			broken = become(j.id)
		}
		if broken != nil {
			j.err = broken
			close(j.done)
			return
		}
		func() {
			defer func() { j.panic = recover() }()
			j.fn()
		}()
		close(j.done)
	}
}

// become gives the calling thread the identity for file access. With a file
// system uid other than 0 the kernel also takes the capabilities that override
// file permissions out of the effective set, and gives them back with 0.
func become(id identity) error {
	var groups unsafe.Pointer
	n := len(id.groups) / 4
	if n > 0 {
		list := make([]uint32, n)
		for i := range list {
			list[i] = binary.NativeEndian.Uint32([]byte(id.groups[4*i : 4*i+4]))
		}
		groups = unsafe.Pointer(&list[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(n), uintptr(groups), 0); e != 0 {
		return fmt.Errorf("setgroups: %w", e)
	}
	if err := setfs(unix.SYS_SETFSGID, id.gid); err != nil {
		return fmt.Errorf("setfsgid(%d): %w", id.gid, err)
	}
	if err := setfs(unix.SYS_SETFSUID, id.uid); err != nil {
		return fmt.Errorf("setfsuid(%d): %w", id.uid, err)
	}
	return nil
}

// setfs calls setfsuid or setfsgid, which report no error: asking for the
// impossible id -1 tells what is in force.
func setfs(trap uintptr, id uint32) error {
	unix.RawSyscall(trap, uintptr(id), 0, 0)
	now, _, _ := unix.RawSyscall(trap, ^uintptr(0), 0, 0)
	if uint32(now) != id {
		return unix.EPERM
	}
	return nil
}

// Permission bits as in a mode's lowest three bits.
const (
	mayExec  = 1
	mayWrite = 2
	mayRead  = 4
)

// aclState remembers whether a file has a POSIX ACL. Setting one changes ctime.
type aclState struct {
	known bool
	has   bool
	ctime unix.Timespec
}

// hasACL tells whether the mode alone decides about access to the file.
func (f *file) hasACL(st *unix.Stat_t) bool {
	if f.x.tree != nil {
		return false // ACLs on disk are about the host's users
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.acl.known && f.acl.ctime == st.Ctim {
		return f.acl.has
	}
	fd := max(f.path, f.rd, f.rw)
	if fd < 0 {
		return true
	}
	// Through /proc because O_PATH descriptors refuse fgetxattr.
	_, err := unix.Getxattr(procPath(fd), "system.posix_acl_access", nil)
	f.acl = aclState{known: true, has: !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP), ctime: st.Ctim}
	return f.acl.has
}

// permitted says whether the identity has all the wanted permissions. The mode
// decides where there is no ACL; else the kernel is asked, as that identity.
func (f *file) permitted(id identity, st *unix.Stat_t, want uint32) bool {
	if id.root() {
		return want&mayExec == 0 || kindOf(st.Mode) == kindDir || st.Mode&0o111 != 0
	}
	if !f.hasACL(st) {
		have := st.Mode & 7
		switch {
		case id.uid == st.Uid:
			have = st.Mode >> 6 & 7
		case id.in(st.Gid):
			have = st.Mode >> 3 & 7
		}
		return have&want == want
	}
	fd, err := f.fd()
	if err != nil {
		return false
	}
	granted := false
	err = f.srv.threads.run(id, func() { granted = faccess(fd, want) == nil })
	return err == nil && granted
}

// faccess is faccessat2 on a descriptor with the file system uid of the calling
// thread (AT_EACCESS: x/sys would emulate this one from the mode).
func faccess(fd int, want uint32) error {
	empty := [1]byte{}
	_, _, e := unix.Syscall6(unix.SYS_FACCESSAT2, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])), uintptr(want),
		unix.AT_EMPTY_PATH|unix.AT_EACCESS, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
