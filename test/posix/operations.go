package posix

import "golang.org/x/sys/unix"

// what an operation does to the name that it is given.
type need int

const (
	existing need = iota // the name must be there
	fresh                // the name must not be there, and is afterwards
	removing             // the name must be there, and isn't afterwards
)

// operation is a system call on a path. Its other path, where it has one, is
// aux: a file that is there, for link and rename, or a name that is free.
type operation struct {
	name    string
	needs   need
	dir     bool // works on directories only
	changes bool // refused on a read-only file system
	run     func(p, aux string) error
}

// operations is the table. Each creates, changes or looks at its path.
var operations = []operation{
	{name: "open O_RDONLY", run: func(p, _ string) error { return open(p, unix.O_RDONLY) }},
	{name: "open O_WRONLY", changes: true, run: func(p, _ string) error { return open(p, unix.O_WRONLY) }},
	{name: "open O_RDWR|O_TRUNC", changes: true, run: func(p, _ string) error { return open(p, unix.O_RDWR|unix.O_TRUNC) }},
	{name: "open O_CREAT", needs: fresh, changes: true, run: func(p, _ string) error { return open(p, unix.O_WRONLY|unix.O_CREAT) }},
	{name: "open O_CREAT|O_EXCL", needs: fresh, changes: true, run: func(p, _ string) error { return open(p, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL) }},
	{name: "open O_DIRECTORY", dir: true, run: func(p, _ string) error { return open(p, unix.O_DIRECTORY) }},
	{name: "open O_PATH", run: func(p, _ string) error { return open(p, unix.O_PATH) }},
	{name: "stat", run: func(p, _ string) error { var st unix.Stat_t; return unix.Stat(p, &st) }},
	{name: "lstat", run: func(p, _ string) error { var st unix.Stat_t; return unix.Lstat(p, &st) }},
	{name: "access", run: func(p, _ string) error { return unix.Access(p, unix.F_OK) }},
	{name: "statfs", run: func(p, _ string) error { var st unix.Statfs_t; return unix.Statfs(p, &st) }},
	{name: "chmod", changes: true, run: func(p, _ string) error { return unix.Chmod(p, 0o777) }},
	{name: "chown", changes: true, run: func(p, _ string) error { return unix.Chown(p, -1, -1) }},
	{name: "lchown", changes: true, run: func(p, _ string) error { return unix.Lchown(p, -1, -1) }},
	{name: "truncate", changes: true, run: func(p, _ string) error { return unix.Truncate(p, 0) }},
	{name: "utimensat", changes: true, run: func(p, _ string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 2}}, 0)
	}},
	{name: "mkdir", needs: fresh, changes: true, run: func(p, _ string) error { return unix.Mkdir(p, 0o755) }},
	{name: "mkfifo", needs: fresh, changes: true, run: func(p, _ string) error { return unix.Mkfifo(p, 0o644) }},
	{name: "mknod file", needs: fresh, changes: true, run: func(p, _ string) error { return unix.Mknod(p, unix.S_IFREG|0o644, 0) }},
	{name: "mknod socket", needs: fresh, changes: true, run: func(p, _ string) error { return unix.Mknod(p, unix.S_IFSOCK|0o644, 0) }},
	{name: "symlink", needs: fresh, changes: true, run: func(p, _ string) error { return unix.Symlink("target", p) }},
	{name: "link to", needs: fresh, changes: true, run: func(p, aux string) error { return unix.Link(aux, p) }},
	{name: "link from", changes: true, run: func(p, aux string) error { return unix.Link(p, aux+".new") }},
	{name: "rename to", needs: fresh, changes: true, run: func(p, aux string) error { return unix.Rename(aux, p) }},
	{name: "rename from", needs: removing, changes: true, run: func(p, aux string) error { return unix.Rename(p, aux+".new") }},
	{name: "unlink", needs: removing, changes: true, run: func(p, _ string) error { return unix.Unlink(p) }},
	{name: "rmdir", needs: removing, dir: true, changes: true, run: func(p, _ string) error { return unix.Rmdir(p) }},
}

func open(p string, flags int) error {
	fd, err := unix.Open(p, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o644)
	if err == nil {
		unix.Close(fd)
	}
	return err
}
