package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// sizes is how much of everything there is.
type sizes struct {
	big    int64         // bytes of the large file
	io     uint32        // bytes of a sequential READ or WRITE; the kernel's server allows less where memory is small
	stat   int           // files of the stat directory
	many   int           // entries of the large directory
	dirs   int           // directories of the tree to walk
	each   int           // files in each of them
	create int           // files to create, unpack and remove
	slice  time.Duration // length of a run that is bounded by time
}

var (
	fullSizes  = sizes{big: 256 << 20, io: maxIO, stat: 3000, many: 100_000, dirs: 1000, each: 20, create: 3000, slice: 1500 * time.Millisecond}
	guestSizes = sizes{big: 64 << 20, io: 256 << 10, stat: 1000, many: 20_000, dirs: 200, each: 20, create: 600, slice: 2 * time.Second}
)

// prepare makes the tree that all servers serve, unless it is there.
func prepare(dir string, n sizes) error {
	mark := filepath.Join(dir, "complete")
	if _, err := os.Stat(mark); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	big, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	block := make([]byte, maxIO)
	for i := range block {
		block[i] = byte(i * 7)
	}
	for at := int64(0); at < n.big; at += maxIO {
		if _, err := big.Write(block); err != nil {
			return err
		}
	}
	if err := big.Close(); err != nil {
		return err
	}
	fill := func(sub string, files int) error {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
		for i := range files {
			if err := os.WriteFile(filepath.Join(dir, sub, fileName(i)), nil, 0o644); err != nil {
				return err
			}
		}
		return nil
	}
	if err := fill("stat", n.stat); err != nil {
		return err
	}
	if err := fill("many", n.many); err != nil {
		return err
	}
	for i := range n.dirs {
		if err := fill(fmt.Sprintf("tree/%03d/%d", i/10, i), n.each); err != nil {
			return err
		}
	}
	return os.WriteFile(mark, nil, 0o644)
}

func fileName(i int) string { return fmt.Sprintf("file-%06d", i) }

// target is a server under test.
type target struct {
	name  string
	nfs   string // address of NFS
	mount string // address of MOUNT
	path  string // what to mount
	root  []byte
	round int
	pid   int // of the server; 0 for the kernel
}

// bench is one run of one load on one server.
type bench struct {
	n       sizes
	t       *target
	clients []*client
	root    []byte
	work    []byte // a directory for this run alone
	begin   time.Time
	stop    time.Time
	patient bool         // nothing is given up
	done    atomic.Int64 // operations
	next    atomic.Int64 // numbers that tasks take
}

// load is one line of the table.
type load struct {
	name   string
	unit   string // of the figure: op is a count, MB MiB in operations of sizes.io
	conns  int
	flight int // calls in flight on each connection
	run    func(b *bench) error
}

func (b *bench) over() bool { return time.Now().After(b.stop) }

// slow says that a load with a number of things to do is given up: the figure is
// that of what was done until then.
func (b *bench) slow() bool { return !b.patient && time.Since(b.begin) > 6*b.n.slice }

// drive runs flight tasks on each connection until all end.
func (b *bench) drive(flight int, mk func() task) error {
	errs := make([]error, len(b.clients))
	var wg sync.WaitGroup
	for i, c := range b.clients {
		tasks := make([]task, flight)
		for j := range tasks {
			tasks[j] = mk()
		}
		wg.Go(func() { errs[i] = c.run(tasks) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// repeat is a task that does one kind of call until the time is over.
func (b *bench) repeat(proc uint32, args func(e *enc), results func(d *dec)) task {
	return func(d *dec, e *enc) uint32 {
		if d != nil {
			results(d)
			b.done.Add(1)
		}
		if b.over() {
			return 0
		}
		args(e)
		return proc
	}
}

// statHandles looks up the files of the stat directory.
func (b *bench) statHandles() (dir []byte, files [][]byte, err error) {
	c := b.clients[0]
	if dir, err = c.lookup(b.root, "stat"); err != nil {
		return nil, nil, err
	}
	for i := range b.n.stat {
		h, err := c.lookup(dir, fileName(i))
		if err != nil {
			return nil, nil, err
		}
		files = append(files, h)
	}
	return dir, files, nil
}

// timed starts the clock after what a load prepares.
func (b *bench) timed() {
	b.begin = time.Now()
	b.stop = b.begin.Add(b.n.slice)
}

func loads() []load {
	return []load{
		{"stat (GETATTR), 1 in flight", "op", 1, 1, getattrs(1)},
		{"stat (GETATTR), 2x16 in flight", "op", 2, 16, getattrs(16)},
		{"stat (LOOKUP), 1 in flight", "op", 1, 1, lookups(1)},
		{"stat (LOOKUP), 2x16 in flight", "op", 2, 16, lookups(16)},
		{"read sequential, 4 in flight", "MB", 1, 4, sequentialRead},
		{"write sequential + COMMIT", "MB", 1, 4, sequentialWrite},
		{"read random 4 KiB, 1 in flight", "op", 1, 1, randomRead(1)},
		{"read random 4 KiB, 2x16 in flight", "op", 2, 16, randomRead(16)},
		{"write random 4 KiB, 2x8 in flight", "op", 2, 8, randomWrite},
		{"create, 2x4 in flight", "op", 2, 4, create(false)},
		{"create + 1 KiB FILE_SYNC, 2x4", "op", 2, 4, create(true)},
		{"unlink, 2x4 in flight", "op", 2, 4, unlink},
		{"READDIR of many, entries", "op", 1, 1, list(procReadDir, 32<<10)},
		{"READDIRPLUS of many, entries", "op", 1, 1, list(procReadDirPlus, 32<<10)},
		{"untar: small files, 2x4", "op", 2, 4, untar},
		{"find: READDIRPLUS walk, entries", "op", 2, 4, walk},
	}
}

func getattrs(flight int) func(b *bench) error {
	return func(b *bench) error {
		_, files, err := b.statHandles()
		if err != nil {
			return err
		}
		b.timed()
		return b.drive(flight, func() task {
			return b.repeat(procGetattr,
				func(e *enc) { e.opaque(files[int(b.next.Add(1))%len(files)]) },
				func(d *dec) { d.status("GETATTR") })
		})
	}
}

func lookups(flight int) func(b *bench) error {
	return func(b *bench) error {
		dir, _, err := b.statHandles()
		if err != nil {
			return err
		}
		b.timed()
		return b.drive(flight, func() task {
			return b.repeat(procLookup,
				func(e *enc) { e.opaque(dir); e.str(fileName(int(b.next.Add(1)) % b.n.stat)) },
				func(d *dec) { d.status("LOOKUP") })
		})
	}
}

func sequentialRead(b *bench) error {
	big, err := b.clients[0].lookup(b.root, "big")
	if err != nil {
		return err
	}
	b.timed()
	return b.drive(4, func() task {
		return b.repeat(procRead,
			func(e *enc) {
				e.opaque(big)
				e.u64(uint64(b.next.Add(1)) * uint64(b.n.io) % uint64(b.n.big))
				e.u32(b.n.io)
			},
			func(d *dec) { readResult(d, b.n.io) })
	})
}

func readResult(d *dec, want uint32) {
	d.status("READ")
	d.attrs()
	if n := d.u32(); n != want {
		d.fail("READ of %d bytes, want %d", n, want)
	}
}

func randomRead(flight int) func(b *bench) error {
	return func(b *bench) error {
		big, err := b.clients[0].lookup(b.root, "big")
		if err != nil {
			return err
		}
		b.timed()
		return b.drive(flight, func() task {
			return b.repeat(procRead,
				func(e *enc) { e.opaque(big); e.u64(uint64(rand.Int64N(b.n.big/4096)) * 4096); e.u32(4096) },
				func(d *dec) { readResult(d, 4096) })
		})
	}
}

// createArgs are those of an UNCHECKED create.
func createArgs(e *enc, dir []byte, name string) {
	e.opaque(dir)
	e.str(name)
	e.u32(0)
	e.sattr(0o644, false)
}

func writeArgs(e *enc, h []byte, off uint64, data []byte, stable uint32) {
	e.opaque(h)
	e.u64(off)
	e.u32(uint32(len(data)))
	e.u32(stable)
	e.opaque(data)
}

func (b *bench) newFile(name string) (h []byte, err error) {
	err = b.clients[0].call(procCreate, func(e *enc) { createArgs(e, b.work, name) }, func(d *dec) {
		d.status("CREATE")
		h = d.handle()
	})
	return h, err
}

func (b *bench) commit(h []byte) error {
	return b.clients[0].call(procCommit, func(e *enc) { e.opaque(h); e.u64(0); e.u32(0) }, func(d *dec) { d.status("COMMIT") })
}

func sequentialWrite(b *bench) error {
	h, err := b.newFile("seq")
	if err != nil {
		return err
	}
	data := make([]byte, b.n.io)
	b.timed()
	err = b.drive(4, func() task {
		return func(d *dec, e *enc) uint32 {
			if d != nil {
				d.status("WRITE")
				b.done.Add(1)
			}
			i := b.next.Add(1) - 1
			if i*int64(b.n.io) >= b.n.big || b.slow() {
				return 0
			}
			writeArgs(e, h, uint64(i)*uint64(b.n.io), data, 0)
			return procWrite
		}
	})
	if err != nil {
		return err
	}
	return b.commit(h)
}

func randomWrite(b *bench) error {
	h, err := b.newFile("random")
	if err != nil {
		return err
	}
	data := make([]byte, 4096)
	b.timed()
	err = b.drive(8, func() task {
		return b.repeat(procWrite,
			func(e *enc) { writeArgs(e, h, uint64(rand.Int64N(16<<20/4096))*4096, data, 0) },
			func(d *dec) { d.status("WRITE") })
	})
	if err != nil {
		return err
	}
	return b.commit(h)
}

// create makes files, as programs do that write one and close it.
func create(content bool) func(b *bench) error {
	return func(b *bench) error {
		data := make([]byte, 1024)
		b.timed()
		return b.drive(4, func() task {
			var h []byte
			return func(d *dec, e *enc) uint32 {
				switch {
				case d == nil:
				case content && h == nil:
					d.status("CREATE")
					if h = d.handle(); h != nil {
						writeArgs(e, h, 0, data, 2)
						return procWrite
					}
					d.fail("CREATE gave no handle")
					return 0
				default:
					d.status("CREATE or WRITE")
					b.done.Add(1)
					h = nil
				}
				i := int(b.next.Add(1))
				if i > b.n.create || b.slow() {
					return 0
				}
				createArgs(e, b.work, fileName(i))
				return procCreate
			}
		})
	}
}

// unlink removes files that it has made before the clock starts.
func unlink(b *bench) error {
	b.patient = true // or there would be too little to remove
	if err := create(false)(b); err != nil {
		return err
	}
	b.patient = false
	b.done.Store(0)
	b.next.Store(0)
	b.timed()
	return b.drive(4, func() task {
		return func(d *dec, e *enc) uint32 {
			if d != nil {
				d.status("REMOVE")
				b.done.Add(1)
			}
			i := int(b.next.Add(1))
			if i > b.n.create || b.slow() {
				return 0
			}
			e.opaque(b.work)
			e.str(fileName(i))
			return procRemove
		}
	})
}

func listArgs(e *enc, dir []byte, cookie, verf uint64, proc, size uint32) {
	e.opaque(dir)
	e.u64(cookie)
	e.u64(verf)
	e.u32(size)
	if proc == procReadDirPlus {
		e.u32(size)
	}
}

// listed reads a listing: each gets the entries but "." and "..".
func listed(d *dec, proc uint32, each func(name []byte, typ uint32, h []byte)) (cookie, verf uint64, eof bool) {
	d.status("READDIR")
	d.attrs()
	verf = d.u64()
	for d.u32() == 1 && d.err == nil {
		d.u64()
		name := d.opaque()
		cookie = d.u64()
		var typ uint32
		var h []byte
		if proc == procReadDirPlus {
			typ = d.attrs()
			if d.u32() == 1 {
				h = d.opaque()
			}
		}
		if string(name) != "." && string(name) != ".." {
			each(name, typ, h)
		}
	}
	return cookie, verf, d.u32() == 1
}

func list(proc, size uint32) func(b *bench) error {
	return func(b *bench) error {
		many, err := b.clients[0].lookup(b.root, "many")
		if err != nil {
			return err
		}
		b.timed()
		err = b.drive(1, func() task {
			return func(d *dec, e *enc) uint32 {
				var cookie, verf uint64
				if d != nil {
					var eof bool
					cookie, verf, eof = listed(d, proc, func([]byte, uint32, []byte) { b.done.Add(1) })
					if eof || b.slow() {
						return 0
					}
				}
				listArgs(e, many, cookie, verf, proc, size)
				return proc
			}
		})
		if err == nil && b.done.Load() != int64(b.n.many) && !b.slow() {
			err = fmt.Errorf("a directory of %d entries was listed with %d", b.n.many, b.done.Load())
		}
		return err
	}
}

// untar does what unpacking an archive does: a directory, then files with
// content that is written, committed and given its mode and time.
func untar(b *bench) error {
	const perDir = 25
	data := make([]byte, 6000)
	b.timed()
	return b.drive(4, func() task {
		var dir, h []byte
		left, step := 0, 0
		name := ""
		return func(d *dec, e *enc) uint32 {
			if d != nil {
				d.status(fmt.Sprintf("step %d of unpacking", step))
				switch step {
				case 0:
					dir = d.handle()
				case 1:
					h = d.handle()
				case 4:
					b.done.Add(1)
				}
				if d.err != nil {
					return 0
				}
				step++
			}
			if step == 5 {
				step = 1
			}
			if step == 1 {
				if left == 0 {
					step = 0
				}
				left--
			}
			switch step {
			case 0:
				i := b.next.Add(1)
				if int(i)*perDir > b.n.create || b.slow() {
					return 0
				}
				left = perDir
				name = fmt.Sprintf("dir-%d", i)
				e.opaque(b.work)
				e.str(name)
				e.sattr(0o755, false)
				return procMkdir
			case 1:
				createArgs(e, dir, fileName(left))
				return procCreate
			case 2:
				writeArgs(e, h, 0, data, 0)
				return procWrite
			case 3:
				e.opaque(h)
				e.u64(0)
				e.u32(0)
				return procCommit
			default:
				e.opaque(h)
				e.sattr(0o640, true)
				e.u32(0)
				return procSetattr
			}
		}
	})
}

// walk lists the whole tree, many directories at once.
func walk(b *bench) error {
	top, err := b.clients[0].lookup(b.root, "tree")
	if err != nil {
		return err
	}
	b.timed()
	for b.done.Load() == 0 || !b.over() {
		var mu sync.Mutex
		queue := [][]byte{top}
		// The two upper levels first, so that all tasks find work.
		for range 2 {
			level := queue
			queue = nil
			for _, dir := range level {
				dirs, err := b.subdirs(b.clients[0], dir)
				if err != nil {
					return err
				}
				queue = append(queue, dirs...)
			}
		}
		err := b.drive(4, func() task {
			var dir []byte
			return func(d *dec, e *enc) uint32 {
				if d != nil {
					cookie, verf, eof := listed(d, procReadDirPlus, func([]byte, uint32, []byte) { b.done.Add(1) })
					if !eof {
						listArgs(e, dir, cookie, verf, procReadDirPlus, 32<<10)
						return procReadDirPlus
					}
				}
				mu.Lock()
				defer mu.Unlock()
				if len(queue) == 0 || b.slow() {
					return 0
				}
				dir, queue = queue[0], queue[1:]
				listArgs(e, dir, 0, 0, procReadDirPlus, 32<<10)
				return procReadDirPlus
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// subdirs lists the directories in a directory. An entry may come without its
// handle (RFC 1813 section 3.3.17): then the client asks for it.
func (b *bench) subdirs(c *client, dir []byte) (dirs [][]byte, err error) {
	var cookie, verf uint64
	for eof := false; !eof && err == nil; {
		var missing []string
		err = c.call(procReadDirPlus,
			func(e *enc) { listArgs(e, dir, cookie, verf, procReadDirPlus, 32<<10) },
			func(d *dec) {
				cookie, verf, eof = listed(d, procReadDirPlus, func(name []byte, _ uint32, h []byte) {
					b.done.Add(1)
					if h == nil {
						missing = append(missing, string(name))
						return
					}
					dirs = append(dirs, append([]byte(nil), h...))
				})
			})
		for _, name := range missing {
			h, lerr := c.lookup(dir, name)
			if lerr != nil {
				return nil, lerr
			}
			dirs = append(dirs, h)
		}
	}
	return dirs, err
}
