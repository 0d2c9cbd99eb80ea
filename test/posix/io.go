package posix

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"
)

func ioChecks() []check {
	return []check{
		{"open", openFlags}, {"open/kinds", openKinds}, {"exclusive", exclusive}, {"text busy", textBusy},
		{"append", appending}, {"truncate", truncate}, {"large file", largeFile}, {"holes", holes},
		{"mmap", mappings}, {"fifo", fifo}, {"socket", socket}, {"fallocate", fallocate}, {"vectors", vectors},
		{"size limit", sizeLimit}, {"execute", execute}, {"xattr", xattr}, {"random access", randomAccess},
	}
}

func openFlags(t *T) {
	d := t.mkdir("d", 0o755)
	f := t.file("f", "text", 0o600)
	t.errno("directory to write", open(d, unix.O_WRONLY), unix.EISDIR)
	t.errno("directory to read and write", open(d, unix.O_RDWR), unix.EISDIR)
	t.errno("directory with truncation", open(d, unix.O_RDONLY|unix.O_TRUNC), unix.EISDIR)
	t.errno("directory with O_CREAT", open(d, unix.O_RDONLY|unix.O_CREAT), unix.EISDIR)
	t.errno("file as directory", open(f, unix.O_DIRECTORY), unix.ENOTDIR)
	t.errno("O_CREAT of what is there", open(f, unix.O_CREAT|unix.O_WRONLY), 0)
	t.is("keeps it", read(f), "text")
	t.errno("O_TRUNC", open(f, unix.O_TRUNC|unix.O_WRONLY), 0)
	t.is("empties it", read(f), "")
	fd, err := unix.Open(f, unix.O_RDONLY, 0)
	t.must(err)
	_, err = unix.Write(fd, []byte("x"))
	t.errno("write to a descriptor for reading", err, unix.EBADF)
	t.errno("ftruncate of it", unix.Ftruncate(fd, 1), unix.EINVAL, unix.EBADF)
	unix.Close(fd)
	fd, err = unix.Open(f, unix.O_WRONLY, 0)
	t.must(err)
	_, err = unix.Read(fd, make([]byte, 1))
	t.errno("read from a descriptor for writing", err, unix.EBADF)
	unix.Close(fd)
	fd, err = unix.Open(d, unix.O_RDONLY, 0)
	t.must(err)
	_, err = unix.Read(fd, make([]byte, 1))
	t.errno("read of a directory", err, unix.EISDIR)
	t.errno("fsync of a directory", unix.Fsync(fd), 0)
	unix.Close(fd)
	for _, flags := range []int{unix.O_SYNC, unix.O_DSYNC, unix.O_NOATIME, unix.O_CLOEXEC | unix.O_NOCTTY} {
		t.errno(fmt.Sprintf("flags %#x", flags), open(f, unix.O_RDWR|flags), 0)
	}
	t.must(unix.Chmod(f, 0o666))
	t.as(bob, func() { t.errno("O_NOATIME on another's file", open(f, unix.O_RDONLY|unix.O_NOATIME), unix.EPERM) })
}

func openKinds(t *T) {
	for _, kind := range kinds {
		t.must(t.make(kind, t.path(kind)))
	}
	t.errno("FIFO to write without a reader", open(t.path("fifo"), unix.O_WRONLY), unix.ENXIO)
	t.errno("FIFO to read", open(t.path("fifo"), unix.O_RDONLY), 0)
	t.errno("socket", open(t.path("socket"), unix.O_RDWR), unix.ENXIO)
	t.errno("block device without driver", open(t.path("block"), unix.O_RDONLY), unix.ENXIO, unix.ENODEV)
	t.errno("the null device", open(t.path("char"), unix.O_RDWR), 0)
	t.errno("dangling link", open(t.path("symlink"), unix.O_RDONLY), unix.ENOENT)
}

// exclusive: of many who create one name exclusively, one succeeds.
func exclusive(t *T) {
	for round := range 20 {
		p := t.path("lock" + itoa(round))
		results := make(chan error)
		for range 8 {
			go func() { results <- open(p, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY) }()
		}
		made := 0
		for range 8 {
			if err := <-results; err == nil {
				made++
			} else if err != unix.EEXIST {
				t.must(err)
			}
		}
		t.is("made", made, 1)
	}
}

// textBusy: a running program isn't written, a written one isn't run.
func textBusy(t *T) {
	p := t.path("program")
	self, err := os.ReadFile("/bin/sleep")
	t.must(err)
	t.must(os.WriteFile(p, self, 0o755))
	cmd := exec.Command(p, "1000")
	if err := cmd.Start(); err != nil {
		t.must(err)
		return
	}
	t.errno("write to a running program", open(p, unix.O_WRONLY), unix.ETXTBSY)
	t.errno("truncate it", unix.Truncate(p, 0), unix.ETXTBSY)
	t.errno("unlink it", unix.Unlink(p), 0)
	t.must(cmd.Process.Kill())
	_ = cmd.Wait()
	t.must(os.WriteFile(p, self, 0o755))
	fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	t.must(err)
	t.errno("run what is open to write", exec.Command(p, "0").Run(), unix.ETXTBSY)
	unix.Close(fd)
	t.errno("run it", exec.Command(p, "0").Run(), 0)
}

func appending(t *T) {
	p := t.file("f", "start", 0o600)
	var fds []int
	for range 3 {
		fd, err := unix.Open(p, unix.O_WRONLY|unix.O_APPEND, 0)
		t.must(err)
		fds = append(fds, fd)
	}
	want := "start"
	for i := range 30 {
		line := fmt.Sprintf("line %d\n", i)
		_, err := unix.Write(fds[i%3], []byte(line))
		t.ok("write", err)
		want += line
	}
	n, err := unix.Pwrite(fds[0], []byte("end"), 0)
	t.ok("pwrite appends too, as in Linux", err)
	want += "end"[:max(n, 0)]
	for _, fd := range fds {
		unix.Close(fd)
	}
	t.is("content", read(p), want)
}

func truncate(t *T) {
	p := t.file("f", "0123456789", 0o600)
	for _, row := range []struct {
		size int64
		want string
	}{{10, "0123456789"}, {4, "0123"}, {8, "0123\x00\x00\x00\x00"}, {0, ""}, {3, "\x00\x00\x00"}} {
		t.errno(fmt.Sprintf("to %d", row.size), unix.Truncate(p, row.size), 0)
		t.is("content", read(p), row.want)
		t.is("size", t.stat(p).Size, row.size)
	}
	t.errno("negative", unix.Truncate(p, -1), unix.EINVAL)
	t.errno("directory", unix.Truncate(t.mkdir("d", 0o755), 0), unix.EISDIR)
	t.must(t.make("fifo", t.path("p")))
	t.errno("FIFO", unix.Truncate(t.path("p"), 0), unix.EINVAL)
	fd, err := unix.Open(p, unix.O_RDWR, 0)
	t.must(err)
	defer unix.Close(fd)
	page := bytes.Repeat([]byte("x"), 10000)
	_, err = unix.Pwrite(fd, page, 0)
	t.ok("write", err)
	t.ok("shrink what isn't written back yet", unix.Ftruncate(fd, 5000))
	t.ok("grow it again", unix.Ftruncate(fd, 9000))
	t.is("zeros where it was cut", read(p), string(page[:5000])+strings.Repeat("\x00", 4000))
	t.errno("ftruncate, negative", unix.Ftruncate(fd, -1), unix.EINVAL)
}

// largeFile: beyond 4 GiB.
func largeFile(t *T) {
	p := t.file("f", "", 0o600)
	for _, off := range []int64{1<<31 - 2, 1<<32 - 2, 5 << 30, 1 << 40} {
		t.ok(fmt.Sprintf("write at %d", off), writeAt(p, "data", off))
		t.is("size", t.stat(p).Size, off+4)
		fd, err := unix.Open(p, unix.O_RDONLY, 0)
		t.must(err)
		buf := make([]byte, 6)
		n, err := unix.Pread(fd, buf, off-2)
		t.ok("read", err)
		t.is("data", string(buf[:max(n, 0)]), "\x00\x00data")
		unix.Close(fd)
	}
	t.yes("takes little room", t.stat(p).Blocks < 1000)
}

func holes(t *T) {
	p := t.file("f", "", 0o600)
	t.must(writeAt(p, "a", 0))
	t.must(writeAt(p, "b", 1<<20))
	t.is("size", t.stat(p).Size, int64(1<<20+1))
	want := make([]byte, 1<<20+1)
	want[0], want[1<<20] = 'a', 'b'
	t.yes("zeros between", read(p) == string(want))
	fd, err := unix.Open(p, unix.O_RDONLY, 0)
	t.must(err)
	defer unix.Close(fd)
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	t.ok("SEEK_DATA", err)
	t.is("data at", off, int64(0))
	off, err = unix.Seek(fd, 1<<20, unix.SEEK_HOLE)
	t.ok("SEEK_HOLE", err)
	t.is("hole at the end", off, int64(1<<20+1))
	_, err = unix.Seek(fd, 1<<21, unix.SEEK_DATA)
	t.errno("SEEK_DATA beyond the end", err, unix.ENXIO)
}

func mappings(t *T) {
	p := t.file("f", strings.Repeat("a", 10000), 0o600)
	fd, err := unix.Open(p, unix.O_RDWR, 0)
	t.must(err)
	m, err := unix.Mmap(fd, 0, 10000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if !t.ok("shared mapping", err) {
		return
	}
	copy(m[5000:], "mapped")
	buf := make([]byte, 6)
	_, err = unix.Pread(fd, buf, 5000)
	t.ok("read", err)
	t.is("a write to memory is read", string(buf), "mapped")
	_, err = unix.Pwrite(fd, []byte("written"), 6000)
	t.ok("write", err)
	t.is("a write is in memory", string(m[6000:6007]), "written")
	t.ok("msync", unix.Msync(m, unix.MS_SYNC))
	t.ok("munmap", unix.Munmap(m))
	unix.Close(fd)
	got := read(p)
	t.is("in the file", got[5000:5006]+got[6000:6007], "mappedwritten")
	fd, err = unix.Open(p, unix.O_RDONLY, 0)
	t.must(err)
	_, err = unix.Mmap(fd, 0, 100, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	t.errno("shared to write, of a descriptor to read", err, unix.EACCES)
	m, err = unix.Mmap(fd, 0, 100, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	t.ok("private", err)
	copy(m, "private")
	t.ok("munmap", unix.Munmap(m))
	unix.Close(fd)
	t.is("stays private", read(p)[:7], "aaaaaaa")
}

func fifo(t *T) {
	p := t.path("f")
	t.must(t.make("fifo", p))
	got := make(chan string)
	go func() { got <- read(p) }()
	w, err := os.OpenFile(p, os.O_WRONLY, 0)
	if t.ok("open", err) {
		_, err = w.WriteString("through the FIFO")
		t.ok("write", err)
		w.Close()
	}
	t.is("read", <-got, "through the FIFO")
}

func socket(t *T) {
	// The path of a socket has 108 bytes at most: go by the directory.
	d, err := unix.Open(t.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	t.must(err)
	defer unix.Close(d)
	addr := &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/s", d)}
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	t.must(err)
	defer unix.Close(l)
	t.errno("bind", unix.Bind(l, addr), 0)
	t.is("kind", t.lstat(t.path("s")).Mode&unix.S_IFMT, uint32(unix.S_IFSOCK))
	t.errno("listen", unix.Listen(l, 1), 0)
	c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	t.must(err)
	defer unix.Close(c)
	t.errno("connect", unix.Connect(c, addr), 0)
	other, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	t.must(err)
	defer unix.Close(other)
	t.errno("bind to the same name", unix.Bind(other, addr), unix.EADDRINUSE)
	t.errno("unlink", unix.Unlink(t.path("s")), 0)
	t.errno("connect to what is gone", unix.Connect(other, addr), unix.ENOENT)
}

func fallocate(t *T) {
	p := t.file("f", "text", 0o600)
	fd, err := unix.Open(p, unix.O_RDWR, 0)
	t.must(err)
	defer unix.Close(fd)
	t.errno("allocate", unix.Fallocate(fd, 0, 0, 10000), 0)
	t.is("size", fstat(fd).Size, int64(10000))
	t.errno("punch a hole", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4), 0)
}

func vectors(t *T) {
	p := t.file("f", "", 0o600)
	fd, err := unix.Open(p, unix.O_RDWR, 0)
	t.must(err)
	defer unix.Close(fd)
	n, err := unix.Pwritev(fd, [][]byte{[]byte("one "), []byte("two "), []byte("three")}, 3)
	t.ok("pwritev", err)
	t.is("bytes", n, 13)
	a, b := make([]byte, 5), make([]byte, 20)
	n, err = unix.Preadv(fd, [][]byte{a, b}, 0)
	t.ok("preadv", err)
	t.is("bytes read", n, 16)
	t.is("data", string(a)+string(b[:max(n, 5)-5]), "\x00\x00\x00one two three")
	g, err := unix.Open(t.path("g"), unix.O_RDWR|unix.O_CREAT, 0o600)
	t.must(err)
	defer unix.Close(g)
	var off int64
	n, err = unix.Sendfile(g, fd, &off, 100)
	t.ok("sendfile", err)
	t.is("sent", n, 16)
	off = 3
	n, err = unix.CopyFileRange(fd, &off, g, nil, 3, 0)
	t.ok("copy_file_range", err)
	t.is("copied", n, 3)
	t.is("result", read(t.path("g")), "\x00\x00\x00one two threeone")
}

// sizeLimit: RLIMIT_FSIZE holds for files of every file system.
func sizeLimit(t *T) {
	var was unix.Rlimit
	t.must(unix.Getrlimit(unix.RLIMIT_FSIZE, &was))
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	p := t.file("f", "", 0o600)
	t.must(unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1000, Max: was.Max}))
	err := writeAt(p, "x", 1000)
	terr := unix.Truncate(p, 2000)
	t.must(unix.Setrlimit(unix.RLIMIT_FSIZE, &was))
	t.errno("write beyond", err, unix.EFBIG)
	t.errno("truncate beyond", terr, unix.EFBIG)
}

// execute: bits x, scripts, and set-user-id programs.
func execute(t *T) {
	t.must(unix.Chmod(t.dir, 0o755))
	p := t.file("script", "#!/bin/sh\necho it runs\n", 0o755)
	out, err := exec.Command(p).Output()
	t.ok("script", err)
	t.is("output", string(out), "it runs\n")
	t.must(unix.Chmod(p, 0o644))
	t.errno("without x", exec.Command(p).Run(), unix.EACCES)
	id, err := os.ReadFile("/usr/bin/id")
	t.must(err)
	t.must(os.WriteFile(t.path("id"), id, 0o755))
	t.must(unix.Chown(t.path("id"), bob.uid, bob.gid))
	t.must(unix.Chmod(t.path("id"), 0o6755))
	out, err = exec.Command(t.path("id"), "-u").Output()
	t.ok("set-user-id program", err)
	t.is("its user", strings.TrimSpace(string(out)), itoa(bob.uid))
	out, err = exec.Command(t.path("id"), "-g").Output()
	t.ok("set-group-id program", err)
	t.is("its group", strings.TrimSpace(string(out)), itoa(bob.gid))
	t.must(unix.Chmod(t.path("id"), 0o711))
	t.as(alice, func() { t.errno("execute what can't be read", access(t.path("id"), unix.X_OK), 0) })
}

func xattr(t *T) {
	p := t.file("f", "", 0o600)
	t.errno("user attribute", unix.Setxattr(p, "user.krg", []byte("value"), 0), 0)
	buf := make([]byte, 100)
	n, err := unix.Getxattr(p, "user.krg", buf)
	t.ok("read it", err)
	t.is("value", string(buf[:max(n, 0)]), "value")
}

// randomAccess compares a file with a model of it, over writes, reads,
// truncations, mappings and reopening.
func randomAccess(t *T) {
	t.must(Model(t.path("f"), t.path("f"), 1, 800))
}

// Model does random operations on a file and on bytes in memory, alternating
// between two paths of the file, which may lie in two mounts or on two machines'
// mounts of it; they must agree after every step. It is deterministic for a seed.
func Model(a, b string, seed uint64, steps int) error {
	r := rand.New(rand.NewPCG(seed, 0))
	var want []byte
	for step := range steps {
		p := a
		if step%2 == 1 {
			p = b
		}
		if err := modelStep(r, p, &want); err != nil {
			return fmt.Errorf("step %d of seed %d: %w", step, seed, err)
		}
	}
	return nil
}

// modelStep opens the file, does some operations and closes it.
func modelStep(r *rand.Rand, p string, want *[]byte) error {
	fd, err := unix.Open(p, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o666)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	got, err := os.ReadFile(p)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, *want) {
		return fmt.Errorf("after opening, %s", difference(got, *want))
	}
	for range r.IntN(6) {
		off, n := r.IntN(200_000), 1+r.IntN(30_000)
		if r.IntN(3) == 0 {
			off = off / 4096 * 4096
		}
		op := r.IntN(6)
		switch op {
		case 0, 1:
			data := make([]byte, n)
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			if _, err := unix.Pwrite(fd, data, int64(off)); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			grow(want, off+n)
			copy((*want)[off:], data)
		case 2:
			if err := unix.Ftruncate(fd, int64(off)); err != nil {
				return fmt.Errorf("truncate: %w", err)
			}
			grow(want, off)
			*want = (*want)[:off]
		case 3:
			if len(*want) == 0 {
				continue
			}
			m, err := unix.Mmap(fd, 0, len(*want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return fmt.Errorf("mmap: %w", err)
			}
			at := r.IntN(len(*want))
			k := copy(m[at:], bytes.Repeat([]byte{byte(r.Uint32())}, n))
			copy((*want)[at:], m[at:at+k])
			if err := unix.Munmap(m); err != nil {
				return fmt.Errorf("munmap: %w", err)
			}
		case 4:
			if err := unix.Fsync(fd); err != nil {
				return fmt.Errorf("fsync: %w", err)
			}
		case 5:
			buf := make([]byte, n)
			k, err := unix.Pread(fd, buf, int64(off))
			if err != nil {
				return fmt.Errorf("read: %w", err)
			}
			exp := []byte{}
			if off < len(*want) {
				exp = (*want)[off:min(off+n, len(*want))]
			}
			if !bytes.Equal(buf[:k], exp) {
				return fmt.Errorf("reading %d at %d, %s", n, off, difference(buf[:k], exp))
			}
		}
	}
	return nil
}

func grow(b *[]byte, n int) {
	if len(*b) < n {
		*b = append(*b, make([]byte, n-len(*b))...)
	}
}

func difference(got, want []byte) string {
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("byte %d is %#x, want %#x (%d and %d bytes)", i, got[i], want[i], len(got), len(want))
		}
	}
	return fmt.Sprintf("there are %d bytes, want %d", len(got), len(want))
}
