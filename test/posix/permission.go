package posix

import (
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

func permissionChecks() []check {
	return []check{
		{"permission/open", openPermission}, {"permission/search", searchPermission},
		{"permission/change directory", directoryPermission}, {"sticky", sticky},
		{"permission/groups", groupPermission}, {"permission/root", rootPermission},
		{"permission/after open", afterOpen},
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

// class is a caller's relation to a file of alice's with group 64100.
type class struct {
	name  string
	id    identity
	shift uint
}

const sharedGroup = 64100

var classes = []class{
	{"owner", alice, 6},
	{"owner who is in the group too", identity{alice.uid, sharedGroup, nil}, 6},
	{"group", identity{bob.uid, sharedGroup, nil}, 3},
	{"supplementary group", identity{bob.uid, bob.gid, []uint32{64050, sharedGroup}}, 3},
	{"last of 16 groups", identity{bob.uid, bob.gid, groups(15, sharedGroup)}, 3},
	{"other", bob, 0},
	{"other with many groups", identity{bob.uid, bob.gid, groups(16)}, 0},
}

func groups(n int, more ...uint32) []uint32 {
	var g []uint32
	for i := range n {
		g = append(g, uint32(64500+i))
	}
	return append(g, more...)
}

// openPermission: each bit for each class, and that no class gets another's.
func openPermission(t *T) {
	for _, c := range classes {
		for bits := range uint32(8) {
			for _, others := range []uint32{0, 0o777} {
				mode := others&^(7<<c.shift) | bits<<c.shift
				t.sub(fmt.Sprintf("%s/%04o", c.name, mode), func(t *T) {
					p := t.file("f", "text", mode)
					t.must(unix.Chown(p, alice.uid, sharedGroup))
					allowed := func(need uint32) unix.Errno {
						if bits&need == need {
							return 0
						}
						return unix.EACCES
					}
					t.as(c.id, func() {
						t.errno("read", open(p, unix.O_RDONLY), allowed(4))
						t.errno("write", open(p, unix.O_WRONLY), allowed(2))
						t.errno("read and write", open(p, unix.O_RDWR), allowed(6))
						t.errno("append", open(p, unix.O_WRONLY|unix.O_APPEND), allowed(2))
						t.errno("create what is there", open(p, unix.O_WRONLY|unix.O_CREAT), allowed(2))
						t.errno("truncate", unix.Truncate(p, 4), allowed(2))
						t.errno("open with truncation", open(p, unix.O_RDWR|unix.O_TRUNC), allowed(6))
						for _, need := range []uint32{1, 2, 4, 5, 6, 7} {
							t.errno("access "+itoa(int(need)), access(p, need), allowed(need))
						}
					})
				})
			}
		}
	}
}

// access is faccessat2 with AT_EACCESS: the thread's own identity.
func access(p string, mode uint32) error {
	return unix.Faccessat(unix.AT_FDCWD, p, mode, unix.AT_EACCESS)
}

// searchPermission: the x of a directory lets through, the r lists.
func searchPermission(t *T) {
	for _, c := range classes {
		for bits := range uint32(8) {
			t.sub(fmt.Sprintf("%s/%o", c.name, bits), func(t *T) {
				d := t.mkdir("d", 0o755)
				t.file("d/f", "text", 0o666)
				t.must(unix.Chown(d, alice.uid, sharedGroup))
				t.must(unix.Chmod(d, bits<<c.shift))
				t.as(c.id, func() {
					want := unix.Errno(unix.EACCES)
					if bits&1 != 0 {
						want = 0
					}
					var st unix.Stat_t
					t.errno("stat in it", unix.Stat(d+"/f", &st), want)
					t.errno("open in it", open(d+"/f", unix.O_RDWR), want)
					t.errno("chdir", open(d+"/.", unix.O_PATH), want)
					t.errno("missing file in it", unix.Stat(d+"/no", &st), orENOENT(want))
					want = unix.EACCES
					if bits&4 != 0 {
						want = 0
					}
					t.errno("list", open(d, unix.O_RDONLY|unix.O_DIRECTORY), want)
					want = unix.EACCES
					if bits&3 == 3 {
						want = 0
					}
					t.errno("make a file", open(d+"/g", unix.O_CREAT|unix.O_WRONLY), want)
					t.errno("rename", unix.Rename(d+"/f", d+"/h"), want)
				})
			})
		}
	}
	// Every operation, below a directory that lets nobody through.
	for _, op := range operations {
		t.sub("closed directory/"+op.name, func(t *T) {
			d := t.mkdir("d", 0o777)
			p := d + "/x"
			aux := t.prepare(op, p)
			t.must(unix.Chmod(t.dir, 0o777))
			t.must(unix.Chmod(d, 0o666))
			t.as(bob, func() { t.errno("result", op.run(p, aux), unix.EACCES) })
		})
	}
}

func orENOENT(e unix.Errno) unix.Errno {
	if e == 0 {
		return unix.ENOENT
	}
	return e
}

// directoryPermission: what changes a directory needs its w.
func directoryPermission(t *T) {
	for _, op := range operations {
		if op.needs == existing && op.name != "link from" {
			continue
		}
		for _, mode := range []uint32{0o555, 0o755, 0o775, 0o757} {
			t.sub(fmt.Sprintf("%s/%o", op.name, mode), func(t *T) {
				d := t.mkdir("d", 0o755)
				t.must(unix.Chmod(t.dir, 0o777))
				p := d + "/x"
				aux := t.prepare(op, p)
				for _, f := range []string{p, aux} {
					_ = unix.Lchown(f, bob.uid, bob.gid) // where they are
				}
				t.must(unix.Chmod(d, mode))
				want := unix.Errno(unix.EACCES)
				if mode&2 != 0 || op.name == "link from" {
					want = 0
				}
				t.as(bob, func() { t.errno("result", op.run(p, aux), want) })
			})
		}
	}
}

// sticky: in a directory with the sticky bit only the owner of the file, the
// owner of the directory and root remove and rename.
func sticky(t *T) {
	for _, kind := range kinds {
		for _, dirOwner := range []int{0, alice.uid, bob.uid} {
			for _, owner := range []int{0, alice.uid, bob.uid} {
				for _, op := range []string{"remove", "rename away", "rename over"} {
					if op == "rename over" && kind == "directory" {
						continue
					}
					t.sub(fmt.Sprintf("%s/%s of %d in a directory of %d", op, kind, owner, dirOwner), func(t *T) {
						t.must(unix.Chmod(t.dir, 0o777))
						d := t.mkdir("d", 0o755)
						p := d + "/x"
						t.must(t.make(kind, p))
						t.must(unix.Lchown(p, owner, owner))
						t.must(unix.Chown(d, dirOwner, dirOwner))
						t.must(unix.Chmod(d, 0o1777))
						want := unix.Errno(unix.EPERM)
						if dirOwner == bob.uid || owner == bob.uid {
							want = 0
						}
						if kind == "directory" {
							// Moving it changes its "..", which takes the right to write it.
							t.must(unix.Chmod(p, 0o777))
						}
						t.as(bob, func() {
							switch {
							case op == "rename away":
								t.errno("result", unix.Rename(p, t.path("y")), want)
							case op == "rename over":
								t.must(t.make("file", t.path("z")))
								t.errno("result", unix.Rename(t.path("z"), p), want)
							case kind == "directory":
								t.errno("result", unix.Rmdir(p), want)
							default:
								t.errno("result", unix.Unlink(p), want)
							}
						})
						var st unix.Stat_t
						gone := unix.Lstat(p, &st) != nil
						t.is("gone", gone, want == 0 && op != "rename over")
					})
				}
			}
		}
	}
}

// groupPermission: new files belong to the caller's group, or to that of a
// set-group-id directory.
func groupPermission(t *T) {
	for _, setgid := range []bool{false, true} {
		for _, op := range operations {
			if op.needs != fresh || op.name == "link to" || op.name == "rename to" {
				continue
			}
			t.sub(fmt.Sprintf("%s/set-group-id %v", op.name, setgid), func(t *T) {
				d := t.mkdir("d", 0o755)
				t.must(unix.Chown(d, 0, sharedGroup))
				mode, want := uint32(0o777), uint32(bob.gid)
				if setgid {
					mode, want = 0o2777, sharedGroup
				}
				t.must(unix.Chmod(d, mode))
				t.as(bob, func() { t.errno("result", op.run(d+"/x", ""), 0) })
				st := t.lstat(d + "/x")
				t.is("owner", st.Uid, uint32(bob.uid))
				t.is("group", st.Gid, want)
				t.is("a directory inherits the bit", st.Mode&unix.S_ISGID != 0, setgid && op.name == "mkdir")
			})
		}
	}
}

// rootPermission: root may what modes forbid.
func rootPermission(t *T) {
	d := t.mkdir("d", 0)
	p := t.file("d/f", "text", 0)
	t.must(unix.Chown(p, alice.uid, alice.gid))
	t.must(unix.Chown(d, alice.uid, alice.gid))
	t.errno("read", open(p, unix.O_RDONLY), 0)
	t.errno("write", open(p, unix.O_RDWR|unix.O_TRUNC), 0)
	t.errno("make", open(d+"/g", unix.O_CREAT|unix.O_WRONLY), 0)
	t.errno("list", open(d, unix.O_DIRECTORY), 0)
	t.errno("execute what nobody may", access(p, 1), unix.EACCES)
	t.must(unix.Chmod(p, 0o001))
	t.errno("execute what somebody may", access(p, 1), 0)
	t.errno("chmod", unix.Chmod(p, 0o7777), 0)
	t.errno("remove", unix.Unlink(p), 0)
}

// afterOpen: permission is checked at open, not later.
func afterOpen(t *T) {
	t.must(unix.Chmod(t.dir, 0o777))
	t.as(alice, func() {
		p := t.path("f")
		fd, err := unix.Open(p, unix.O_CREAT|unix.O_RDWR, 0)
		if !t.ok("create with mode 0", err) {
			return
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("hello"))
		t.ok("write", err)
		t.ok("fsync", unix.Fsync(fd))
		t.ok("truncate", unix.Ftruncate(fd, 4))
		buf := make([]byte, 8)
		n, err := unix.Pread(fd, buf, 0)
		t.ok("read", err)
		t.is("content", string(buf[:max(n, 0)]), "hell")
		t.errno("open again", open(p, unix.O_RDONLY), unix.EACCES)
		t.ok("chmod", unix.Fchmod(fd, 0o400))
		t.errno("open to write", open(p, unix.O_WRONLY), unix.EACCES)
		t.errno("open to read", open(p, unix.O_RDONLY), 0)
	})
}
