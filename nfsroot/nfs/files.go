package nfs

import (
	"container/list"
	"errors"
	"hash/maphash"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// How long a file that nobody asks for stays open. Descriptors for writing go
// first: while one is open, the host can't execute the file (ETXTBSY).
const (
	writeIdle = 5 * time.Second
	fileIdle  = time.Minute
)

// file is a file of an export that requests are working on or that is cached.
// There is at most one for a kernel handle, so its locks order the requests.
type file struct {
	srv  *Server
	x    *export
	h    kernelHandle
	k    atomic.Uint32 // kind; 0 until known
	dead atomic.Bool   // seen without a name

	part *filePart

	// guarded by part.mu
	refs int
	used int64         // when it was released, by the clock of connSet
	elem *list.Element // nil once out of the cache

	// change is held around "attributes before, change, attributes after", so
	// that the wcc data of a reply (RFC 1813 section 2.6) covers that change
	// and no other: a client would take another's change for its own.
	change sync.Mutex
	// dirpos guards the position of a directory's descriptor.
	dirpos sync.Mutex

	mu   sync.Mutex // guards what follows; descriptors are closed only when refs is 0
	path int        // O_PATH
	rd   int        // O_RDONLY
	rw   int        // O_RDWR
	wire []byte
	acl  aclState
	meta metaState // of a tree
}

// fileKey names a file among all exports.
type fileKey struct {
	x *export
	h kernelHandle
}

// fileCache keeps files open between requests, least recently used first out.
// Its cost is that of a map: nothing grows with the number of files that
// clients know. It has parts with a lock each, so that connections do not wait
// for each other.
type fileCache struct {
	srv   *Server
	seed  maphash.Seed
	parts []filePart
}

// filePart is the files whose handles have the same hash.
type filePart struct {
	max int

	mu    sync.Mutex
	files map[fileKey]*file // guarded by mu
	lru   *list.List        // of *file, most recently used in front; guarded by mu
}

// maxFiles chooses the size of the cache: a file holds up to three descriptors.
func maxFiles(want int) int {
	if want <= 0 {
		want = 4096
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && lim.Cur < uint64(want)*4 {
		want = max(64, int(lim.Cur/4))
	}
	return want
}

func newFileCache(s *Server, size int) *fileCache {
	parts := 1
	if size >= 1024 {
		parts = 16
	}
	c := &fileCache{srv: s, seed: maphash.MakeSeed(), parts: make([]filePart, parts)}
	for i := range c.parts {
		c.parts[i] = filePart{max: size / parts, files: map[fileKey]*file{}, lru: list.New()}
	}
	return c
}

// part is where the file of a handle is if it is cached.
func (c *fileCache) part(h []byte) *filePart {
	return &c.parts[maphash.Bytes(c.seed, h)%uint64(len(c.parts))]
}

// cached returns a referenced file if it is in the cache, else nil.
func (c *fileCache) cached(x *export, h []byte) *file {
	p := c.part(h)
	p.mu.Lock()
	f := p.files[fileKey{x, kernelHandle(h)}]
	if f != nil {
		f.refs++
		p.lru.MoveToFront(f.elem)
	}
	p.mu.Unlock()
	if f != nil {
		c.srv.count.cacheHits.Add(1)
	}
	return f
}

// get returns the referenced file of a handle. Nothing is opened yet: a handle
// whose file is gone shows when a descriptor is asked for.
func (c *fileCache) get(x *export, h kernelHandle, k kind) *file {
	if f := c.cached(x, []byte(h)); f != nil {
		return f
	}
	p := c.part([]byte(h))
	p.mu.Lock()
	key := fileKey{x, h}
	f := p.files[key]
	if f == nil {
		f = &file{srv: c.srv, x: x, h: h, part: p, path: -1, rd: -1, rw: -1}
		f.k.Store(uint32(k))
		p.files[key] = f
		f.elem = p.lru.PushFront(f)
		c.srv.count.cacheMisses.Add(1)
	}
	f.refs++
	var out []*file
	for e := p.lru.Back(); e != nil && len(p.files) > p.max; {
		old := e.Value.(*file)
		e = e.Prev()
		if old.refs == 0 {
			p.remove(old)
			out = append(out, old)
		}
	}
	p.mu.Unlock()
	for _, old := range out {
		old.closeAll()
	}
	return f
}

// remove takes a file out of the cache; mu is held.
func (p *filePart) remove(f *file) {
	if f.elem == nil {
		return
	}
	p.lru.Remove(f.elem)
	f.elem = nil
	delete(p.files, fileKey{f.x, f.h})
}

// release gives a reference back.
func (f *file) release() {
	p := f.part
	p.mu.Lock()
	f.refs--
	f.used = f.srv.conns.now()
	if f.elem != nil && (f.dead.Load() || f.refs == 0 && !f.isOpen()) {
		p.remove(f)
	}
	gone := f.refs == 0 && f.elem == nil
	p.mu.Unlock()
	if gone {
		f.closeAll()
	}
}

// forget drops a file from the cache if its last name is gone: an open
// descriptor would keep its disk space. Requests that hold it finish with it.
func (c *fileCache) forget(x *export, h kernelHandle) {
	if f := c.cached(x, []byte(h)); f != nil {
		var st unix.Stat_t
		f.stat(&st) // notices
		f.release()
	}
}

// sweep closes what has been idle for too long at a time of connSet's clock.
// Files removed on the host, behind the server's back, give their disk space
// back this way.
func (c *fileCache) sweep(now int64) {
	for i := range c.parts {
		c.parts[i].sweep(now)
	}
}

func (p *filePart) sweep(now int64) {
	var fds []int
	var out []*file
	p.mu.Lock()
	for e := p.lru.Back(); e != nil; {
		f := e.Value.(*file)
		e = e.Prev()
		if f.refs > 0 {
			continue
		}
		idle := time.Duration(now - f.used)
		if idle < writeIdle {
			break // in LRU order: the rest is younger
		}
		if idle >= fileIdle {
			p.remove(f)
			out = append(out, f)
			continue
		}
		f.mu.Lock()
		if f.rw >= 0 {
			fds = append(fds, f.rw)
			f.rw = -1
		}
		if f.path < 0 && f.rd < 0 {
			p.remove(f)
		}
		f.mu.Unlock()
	}
	p.mu.Unlock()
	// Closing may write: not under the lock.
	for _, fd := range fds {
		unix.Close(fd)
	}
	for _, f := range out {
		f.closeAll()
	}
}

// evictIdle closes every file that no request holds: the process has run out
// of descriptors.
func (c *fileCache) evictIdle() { c.sweep(math.MaxInt64) }

func (c *fileCache) closeAll() {
	for i := range c.parts {
		p := &c.parts[i]
		p.mu.Lock()
		var out []*file
		for _, f := range p.files {
			out = append(out, f)
		}
		for _, f := range out {
			p.remove(f)
		}
		p.mu.Unlock()
		for _, f := range out {
			f.closeAll()
		}
	}
}

func (c *fileCache) len() (n int) {
	for i := range c.parts {
		p := &c.parts[i]
		p.mu.Lock()
		n += len(p.files)
		p.mu.Unlock()
	}
	return n
}

func (f *file) isOpen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.path >= 0 || f.rd >= 0 || f.rw >= 0
}

func (f *file) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fd := range []*int{&f.path, &f.rd, &f.rw} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// openHow opens the file by its handle.
func (f *file) openHow(flags int) (int, error) {
	fd, err := f.openByHandle(flags)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		f.srv.files.evictIdle()
		fd, err = f.openByHandle(flags)
	}
	return fd, err
}

// fd returns a descriptor good for attributes and, on a directory, for names.
func (f *file) fd() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fd := range [...]int{f.path, f.rd, f.rw} {
		if fd >= 0 {
			return fd, nil
		}
	}
	fd, err := f.openHow(unix.O_PATH)
	if err != nil {
		return -1, err
	}
	f.path = fd
	return fd, nil
}

// readFD returns a descriptor for reading a regular file or a directory. Other
// kinds are never opened: a FIFO would wait, a device would act.
func (f *file) readFD() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rd >= 0 {
		return f.rd, nil
	}
	flags := unix.O_RDONLY
	switch f.kind() {
	case kindReg:
		if f.rw >= 0 {
			return f.rw, nil
		}
	case kindDir:
		flags |= unix.O_DIRECTORY
	default:
		return -1, unix.EINVAL
	}
	fd, err := f.openHow(flags)
	if err != nil {
		return -1, err
	}
	f.rd = fd
	return fd, nil
}

// writeFD returns a descriptor for writing a regular file.
func (f *file) writeFD() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rw >= 0 {
		return f.rw, nil
	}
	if f.kind() != kindReg {
		return -1, unix.EINVAL
	}
	if f.x.tree != nil && f.x.ReadOnly {
		return -1, unix.EROFS
	}
	fd, err := f.openHow(unix.O_RDWR)
	if err != nil {
		return -1, err
	}
	f.rw = fd
	return fd, nil
}

// adopt gives the file a descriptor for writing that was made otherwise.
func (f *file) adopt(fd int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rw >= 0 {
		unix.Close(fd)
		return
	}
	f.rw = fd
}

// stat reads the file's attributes.
func (f *file) stat(st *unix.Stat_t) error {
	fd, err := f.fd()
	if err != nil {
		return err
	}
	if err := f.readAttr(fd, st); err != nil {
		return err
	}
	if f.k.Load() == 0 {
		f.k.Store(uint32(kindOf(st.Mode)))
	}
	if st.Nlink == 0 {
		f.dead.Store(true)
	}
	return nil
}

// kind is the file's type, 0 for a file that has neither come in by a handle of
// ours nor been asked for its attributes.
func (f *file) kind() kind { return kind(f.k.Load()) }

// handle returns the wire handle, nil when the file is gone.
func (f *file) handle() []byte {
	if f.kind() == 0 {
		var st unix.Stat_t
		if f.stat(&st) != nil {
			return nil
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wire == nil {
		f.wire = f.srv.seal(f.x, f.kind(), f.h)
	}
	return f.wire
}

// procPath names the open file for system calls that take no descriptor. The
// link is resolved by the kernel to the file itself, not through its name.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
