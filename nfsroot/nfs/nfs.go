// Package nfs is the file server of the shared root: NFS version 3 and MOUNT
// version 3 (RFC 1813) over ONC RPC (RFC 5531) on one TCP port, for directory
// trees on this machine. The head node serves the cluster's root file system
// with it, read-write, to many Linux kernel clients at once.
//
// The way of a request:
//
//	conn.go      a record is read from a connection
//	rpc.go       its call header is decoded
//	serve.go     credentials are checked, the procedure is found and run
//	handle.go    its file handle is verified (a keyed MAC) ...
//	files.go     ... and becomes an open file, from the cache or by the kernel's
//	             open_by_handle_at(2)
//	proc_*.go    the procedure does its work
//	backend.go   by asking the system, in one place
//	identity.go  under the caller's uid, gid and groups where the kernel's own
//	             permission check is the judge
//	attr.go      attributes and status are encoded into the reply
//
// A file handle is a pure function of the file and the key, so a restart of the
// server is invisible to clients, also for files that are open, renamed or
// unlinked while in use. The server never follows a symbolic link, never
// crosses a mount point (it works on a private clone of the export's mount
// without what is mounted below it), never opens a device, and resolves names
// one component at a time relative to an open directory: nothing outside an
// export can be named.
//
// It needs root: CAP_DAC_READ_SEARCH for open_by_handle_at, CAP_SYS_ADMIN to
// clone the mount, CAP_SETUID and CAP_SETGID to take the callers' identities.
//
// Any user can serve a tree that was made without root (Export.Kept, package
// meta). There the server does by itself what the kernel does for root: tree.go.
package nfs

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// ErrPrivilege says that the process lacks a privilege the server can't do
// without.
var ErrPrivilege = errors.New("privilege missing")

// ErrNoHandles says that an export lies on a file system without file handles.
var ErrNoHandles = errors.New("file system has no file handles")

// minKey is the shortest acceptable handle key in bytes.
const minKey = 16

// Config is what a Server is made of.
type Config struct {
	// Exports are the served trees; paths must differ.
	Exports []Export
	// HandleKey signs file handles: at least 16 secret bytes, kept over
	// restarts. Another key makes every handle that clients hold stale.
	HandleKey []byte
	// Log gets connections, refusals and internal errors; nil discards.
	Log *slog.Logger
	// Allow decides who may connect; nil lets everyone in. It is asked at
	// each connection and every few seconds while one is open, with an address
	// that is never an IPv4-mapped IPv6 one.
	Allow func(netip.Addr) bool
	// PrivilegedPorts refuses connections from ports above 1023. On a node only
	// root can use the others, and who a request comes from is what the client
	// says (AUTH_SYS): without this, any user of a node could say to be root.
	PrivilegedPorts bool
	// ReplayLog is a file in which the server notes the calls that can't be done
	// twice, so that a client that repeats one after the server was killed gets
	// the answer to the first. Empty: they are forgotten with the process.
	ReplayLog string
	// MaxConns bounds the open connections; 0 means 512.
	MaxConns int
	// MaxFiles bounds the files kept open between requests; 0 means 4096, or
	// less where RLIMIT_NOFILE demands it.
	MaxFiles int
}

// Export is one served directory tree.
type Export struct {
	Path       string // what clients mount, for example "/"
	Dir        string // the directory on this machine
	ReadOnly   bool   // refuse every change
	RootSquash bool   // callers with uid or gid 0 act as 65534
	// Kept says that the directory belongs to the user who runs the server, and
	// the owners of its files are kept in attributes (package meta). Such an
	// export takes no privilege.
	Kept bool
}

// Server serves its exports. Its methods may be called from any goroutine.
type Server struct {
	log      *slog.Logger
	allow    func(netip.Addr) bool
	lowPorts bool // refuse clients on ports above 1023
	key      []byte
	macs     sync.Pool // of hash.Hash; see mac
	exports  []*export // longest path first
	files    *fileCache
	threads  *threadPool
	replays  *replayCache
	births   births
	count    counters
	conns    *connSet

	maxConns int64
	memory   *semaphore.Weighted // bytes of requests and replies being worked on

	// writeVerf changes when unstable writes may have been lost: at start, and
	// after a failed COMMIT (RFC 1813 section 3.3.7, writeverf3).
	writeVerf atomic.Uint64
	started   time.Time

	closeOnce sync.Once
}

// export is an Export that is open.
type export struct {
	Export
	id    uint32 // names the export in handles; from its path and the key
	fsid  uint64
	clone int       // keeps the detached clone of the directory's mount
	mount int       // the directory on the clone: open_by_handle_at refuses O_PATH descriptors
	tree  *keptTree // of an export that is kept: it has neither of the two
	root  *file
}

// New opens the exports and checks that the process may do what serving them
// takes. The process must not change its umask, user or groups from then on.
// Close releases them.
func New(cfg Config) (_ *Server, err error) {
	if len(cfg.Exports) == 0 {
		return nil, errors.New("nfs: no export configured; name at least one directory")
	}
	if len(cfg.HandleKey) < minKey {
		return nil, fmt.Errorf("nfs: the handle key has %d bytes, it needs %d or more; make one with nfs.LoadKey", len(cfg.HandleKey), minKey)
	}
	s := &Server{
		log:      cfg.Log,
		allow:    cfg.Allow,
		lowPorts: cfg.PrivilegedPorts,
		key:      append([]byte(nil), cfg.HandleKey...),
		maxConns: int64(cfg.MaxConns),
		memory:   semaphore.NewWeighted(serverMemory),
		threads:  newThreadPool(maxThreads),
		conns:    newConnSet(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.log = s.log.With("component", "nfs")
	if s.maxConns <= 0 {
		s.maxConns = 512
	}
	var replays *replayLog
	if cfg.ReplayLog != "" {
		if replays, err = openReplayLog(cfg.ReplayLog, maxReplays); err != nil {
			return nil, err
		}
	}
	s.replays = newReplayCache(maxReplays, replays)
	s.files = newFileCache(s, maxFiles(cfg.MaxFiles))
	var verf [8]byte
	rand.Read(verf[:])
	s.writeVerf.Store(binary.BigEndian.Uint64(verf[:]))
	s.started = time.Now()

	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if slices.ContainsFunc(cfg.Exports, func(e Export) bool { return !e.Kept }) {
		if err := s.threads.check(); err != nil {
			return nil, fmt.Errorf("nfs: can't act as another user on file access: %w (%w: run as root, with CAP_SETUID and CAP_SETGID)", err, ErrPrivilege)
		}
	}
	for _, e := range cfg.Exports {
		if err := s.addExport(e); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Server) addExport(e Export) (err error) {
	if !strings.HasPrefix(e.Path, "/") || path.Clean(e.Path) != e.Path {
		return fmt.Errorf("nfs: export path %q: write it absolute and without trailing slash, for example / or /home", e.Path)
	}
	for _, x := range s.exports {
		if x.Path == e.Path {
			return fmt.Errorf("nfs: export path %q is there twice; give each export its own", e.Path)
		}
	}
	sum := s.mac(nil, []byte("export\x00"+e.Path))
	x := &export{Export: e, id: binary.BigEndian.Uint32(sum), fsid: binary.BigEndian.Uint64(sum[4:])}
	for _, other := range s.exports {
		if other.id == x.id {
			return fmt.Errorf("nfs: exports %q and %q get the same id with this key; rename one", e.Path, other.Path)
		}
	}
	if e.Kept {
		return s.addTree(x)
	}
	if x.clone, err = cloneMount(e.Dir, e.ReadOnly); err != nil {
		return fmt.Errorf("nfs: export %s: %w", e.Path, err)
	}
	defer func() {
		if err != nil {
			unix.Close(x.clone)
		}
	}()
	if kept, err := meta.Marked(e.Dir); err != nil || kept {
		return fmt.Errorf("nfs: export %s: %w", e.Path, cmp.Or(err, fmt.Errorf("%s was made without root, and the owners of its files are not those on disk; serve it as the user that it belongs to", e.Dir)))
	}
	if x.mount, err = unix.Openat(x.clone, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("nfs: export %s: opening %s: %w", e.Path, e.Dir, err)
	}
	defer func() {
		if err != nil {
			unix.Close(x.mount)
		}
	}()
	h, err := handleAt(x.mount, "")
	if err != nil {
		return fmt.Errorf("nfs: export %s: %w: %s (%w); put the tree on ext4, xfs, btrfs or tmpfs", e.Path, ErrNoHandles, e.Dir, err)
	}
	root := s.files.get(x, h, kindDir)
	if _, err := root.fd(); err != nil {
		root.release()
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("nfs: export %s: open_by_handle_at on %s: %w (%w: run as root, with CAP_DAC_READ_SEARCH)", e.Path, e.Dir, err, ErrPrivilege)
		}
		return fmt.Errorf("nfs: export %s: opening %s by its handle: %w (%w)", e.Path, e.Dir, err, ErrNoHandles)
	}
	s.opened(x, root)
	return nil
}

// addTree opens an export that is kept.
func (s *Server) addTree(x *export) (err error) {
	x.clone, x.mount = -1, -1
	if st, err := os.Stat(x.Dir); err == nil && !st.IsDir() {
		return fmt.Errorf("nfs: export %s: %s is not a directory; name the directory to serve", x.Path, x.Dir)
	}
	if x.tree, err = openTree(x.Dir, s.log, s.writeVerf.Load()); err != nil {
		return fmt.Errorf("nfs: export %s: %w", x.Path, err)
	}
	root := s.files.get(x, x.tree.top, kindDir)
	if _, err := root.fd(); err != nil {
		root.release()
		x.tree.close()
		return fmt.Errorf("nfs: export %s: opening %s: %w", x.Path, x.Dir, err)
	}
	s.opened(x, root)
	return nil
}

// opened takes an export into use.
func (s *Server) opened(x *export, root *file) {
	x.root = root // the reference is kept until Close
	s.exports = append(s.exports, x)
	for i := len(s.exports) - 1; i > 0 && len(s.exports[i].Path) > len(s.exports[i-1].Path); i-- {
		s.exports[i], s.exports[i-1] = s.exports[i-1], s.exports[i]
	}
}

// cloneMount returns a descriptor of a private, detached clone of the mount at
// dir. The clone has none of the mounts below dir, refuses to open devices and
// to follow symbolic links, and is read-only where asked: what a client does can
// neither leave the tree nor touch what the host mounted into it.
func cloneMount(dir string, readOnly bool) (int, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return -1, fmt.Errorf("directory to serve: %w", err)
	}
	if !st.IsDir() {
		return -1, fmt.Errorf("%s is not a directory; name the directory to serve", dir)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return -1, fmt.Errorf("open_tree on %s: %w (%w: run as root, with CAP_SYS_ADMIN)", dir, err, ErrPrivilege)
		}
		return -1, fmt.Errorf("open_tree on %s: %w", dir, err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSYMFOLLOW}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount_setattr on a clone of %s (needs Linux 5.12): %w", dir, err)
	}
	return fd, nil
}

// Close releases the exports, the cached files and the threads. Call it after
// Serve has returned.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		for _, x := range s.exports {
			x.root.release()
		}
		s.files.closeAll()
		for _, x := range s.exports {
			if x.tree != nil {
				x.tree.close()
				continue
			}
			unix.Close(x.mount)
			unix.Close(x.clone)
		}
		s.threads.close()
		if s.replays != nil && s.replays.log != nil {
			s.replays.log.close()
		}
	})
	return nil
}

// mac appends the keyed hash of p to sum: that under everything that must not be
// guessed. A used hash starts from the state after the key, so it is kept.
func (s *Server) mac(sum, p []byte) []byte {
	h, _ := s.macs.Get().(hash.Hash)
	if h == nil {
		h = hmac.New(sha256.New, s.key)
	}
	h.Write(p)
	sum = h.Sum(sum)
	h.Reset()
	s.macs.Put(h)
	return sum
}

// exportByID finds the export that a handle names.
func (s *Server) exportByID(id uint32) *export {
	for _, x := range s.exports {
		if x.id == id {
			return x
		}
	}
	return nil
}

// LoadKey reads a handle key from a file, and makes the file with 32 random
// bytes, readable by its owner alone, when it does not exist. Two processes must
// not do this on one file at the same time.
func LoadKey(file string) ([]byte, error) {
	key, err := os.ReadFile(file)
	switch {
	case err == nil && len(key) < minKey:
		return nil, fmt.Errorf("nfs: handle key %s is damaged (%d bytes); restore it, or remove it and reboot the nodes", file, len(key))
	case err == nil:
		return key, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("nfs: handle key: %w", err)
	}
	key = make([]byte, 32)
	rand.Read(key)
	if err := renameio.WriteFile(file, key, 0o600); err != nil {
		return nil, fmt.Errorf("nfs: writing a new handle key: %w", err)
	}
	return key, nil
}

// bumpVerifier makes clients send their unstable writes again: some of them
// may be lost.
func (s *Server) bumpVerifier(ctx context.Context, why error) {
	s.writeVerf.Add(1)
	s.log.LogAttrs(ctx, slog.LevelError, "write-back failed; clients will send their data again", slog.Any("error", why))
}
