package live

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"krgimage/configs"
	"krgimage/nfsroot/meta"
)

// accounts are the four account files of a root: passwd(5), shadow(5),
// group(5), gshadow(5).
type accounts struct {
	passwd, shadow, group, gshadow table
}

// table is one file, line by line; lines that are not of the file's form stay as
// they are.
type table struct {
	width int // fields of a line
	lines []line
}

// line is a parsed line, or with no fields a line that is kept verbatim.
type line struct {
	raw    string
	fields []string
}

const (
	passwdFields, shadowFields, groupFields, gshadowFields = 7, 9, 4, 4
	// Local accounts and groups are made from 1000 on (login.defs(5),
	// adduser.conf(5)); from 60000 on ids are reserved (Debian Policy §9.2.2).
	firstLocalID, lastLocalID = 1000, 59999
)

func parseTable(text string, width int) table {
	t := table{width: width}
	for raw := range strings.Lines(text) {
		raw = strings.TrimSuffix(raw, "\n")
		l := line{raw: raw}
		fields := strings.Split(raw, ":")
		if len(fields) == width && fields[0] != "" && !strings.ContainsAny(fields[0][:1], "#+-") {
			l.fields = fields
		}
		t.lines = append(t.lines, l)
	}
	return t
}

func (t table) String() string {
	var b strings.Builder
	for _, l := range t.lines {
		if l.fields != nil {
			b.WriteString(strings.Join(l.fields, ":"))
		} else {
			b.WriteString(l.raw)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// find returns the fields of name, nil when there is none. Changes to them
// change the table.
func (t *table) find(name string) []string {
	for _, l := range t.lines {
		if l.fields != nil && l.fields[0] == name {
			return l.fields
		}
	}
	return nil
}

// byID returns the fields whose third is id.
func (t *table) byID(id int) []string {
	for _, l := range t.lines {
		if l.fields != nil && l.id() == id {
			return l.fields
		}
	}
	return nil
}

func (l line) id() int {
	if len(l.fields) < 3 {
		return -1
	}
	id, err := strconv.Atoi(l.fields[2])
	if err != nil {
		return -1
	}
	return id
}

func (l line) local() bool {
	id := l.id()
	return id >= firstLocalID && id <= lastLocalID
}

// set adds fields or replaces the line of that name.
func (t *table) set(fields ...string) {
	for i, l := range t.lines {
		if l.fields != nil && l.fields[0] == fields[0] {
			t.lines[i].fields = fields
			return
		}
	}
	t.lines = append(t.lines, line{fields: fields})
}

func (t *table) remove(name string) {
	t.lines = slices.DeleteFunc(t.lines, func(l line) bool { return l.fields != nil && l.fields[0] == name })
}

func members(list string) []string {
	return slices.DeleteFunc(strings.Split(list, ","), func(s string) bool { return s == "" })
}

// carryOver merges what people made in an old root into a new one: local
// accounts and groups, passwords of local accounts and of root, membership of
// local accounts in system groups. What the new root already has wins, save for
// passwords. It returns what was carried over, and what could not be, for
// people. Doing it twice changes nothing more.
func (a *accounts) carryOver(old *accounts) (kept, conflicts []string) {
	for _, l := range old.passwd.lines {
		if !l.local() {
			continue
		}
		name := l.fields[0]
		if mine := a.passwd.find(name); mine != nil {
			if mine[2] != l.fields[2] {
				conflicts = append(conflicts, fmt.Sprintf("account %s has the uid %s now; its files from before belong to %s (chown -R %s /home/%s on a node)", name, mine[2], l.fields[2], name, name))
			}
		} else if other := a.passwd.byID(l.id()); other != nil {
			conflicts = append(conflicts, fmt.Sprintf("account %s was not kept: its uid %s is %s's now", name, l.fields[2], other[0]))
			continue
		} else {
			a.passwd.set(slices.Clone(l.fields)...)
			kept = append(kept, "account "+name)
		}
	}
	for _, l := range old.shadow.lines {
		if l.fields == nil {
			continue
		}
		name := l.fields[0]
		account, before := a.passwd.find(name), old.passwd.find(name)
		if account == nil || before == nil || (name != "root" && !line{fields: account}.local()) {
			continue
		}
		if mine := a.shadow.find(name); mine != nil {
			if hasPassword(l.fields[1]) || strings.HasPrefix(l.fields[1], "!") {
				copy(mine, l.fields) // with the password go its dates
			}
		} else {
			a.shadow.set(slices.Clone(l.fields)...)
		}
	}
	for _, l := range old.group.lines {
		if l.fields == nil {
			continue
		}
		name := l.fields[0]
		mine := a.group.find(name)
		if mine == nil && l.local() {
			if other := a.group.byID(l.id()); other != nil {
				conflicts = append(conflicts, fmt.Sprintf("group %s was not kept: its gid %s is %s's now", name, l.fields[2], other[0]))
				continue
			}
			mine = []string{name, l.fields[1], l.fields[2], ""}
			a.group.set(mine...)
			if a.passwd.find(name) == nil {
				kept = append(kept, "group "+name)
			}
			if g := old.gshadow.find(name); g != nil && a.gshadow.find(name) == nil {
				a.gshadow.set(slices.Clone(g)...)
			}
		}
		if mine != nil {
			a.addMembers(name, members(l.fields[3]))
		}
	}
	return kept, conflicts
}

// addMembers adds those accounts that exist and are local to a group.
func (a *accounts) addMembers(group string, names []string) {
	names = slices.DeleteFunc(names, func(name string) bool {
		account := a.passwd.find(name)
		return account == nil || !line{fields: account}.local()
	})
	for _, t := range []*table{&a.group, &a.gshadow} {
		fields := t.find(group)
		if fields == nil {
			continue
		}
		all := members(fields[3])
		for _, name := range names {
			if !slices.Contains(all, name) {
				all = append(all, name)
			}
		}
		fields[3] = strings.Join(all, ",")
	}
}

// hasPassword holds for a hash: "*", "!" and the empty field are none.
func hasPassword(field string) bool {
	return strings.HasPrefix(field, "$") || strings.HasPrefix(field, "_")
}

// configure makes the accounts of cluster.yaml, with a locked password unless
// one was set, and takes away those that it had and has no more. It returns the
// names that went.
func (a *accounts) configure(users []configs.User, before []string) (gone []string, err error) {
	for _, name := range before {
		if slices.ContainsFunc(users, func(u configs.User) bool { return u.Name == name }) || a.passwd.find(name) == nil {
			continue
		}
		a.drop(name)
		gone = append(gone, name)
	}
	var clashes []error
	for _, u := range users {
		id, shell := strconv.Itoa(u.UID), cmp.Or(u.Shell, "/bin/bash")
		if other := a.passwd.byID(u.UID); other != nil && other[0] != u.Name {
			clashes = append(clashes, fmt.Errorf("users: the uid %d of %s belongs to the account %s, which was made on the cluster\n  fix: give %s another uid in cluster.yaml, or add %s there too", u.UID, u.Name, other[0], u.Name, other[0]))
			continue
		}
		if other := a.group.byID(u.UID); other != nil && other[0] != u.Name {
			clashes = append(clashes, fmt.Errorf("users: the gid %d of %s belongs to the group %s, which was made on the cluster\n  fix: give %s another uid in cluster.yaml", u.UID, u.Name, other[0], u.Name))
			continue
		}
		if mine := a.passwd.find(u.Name); mine != nil {
			if (line{fields: mine}).id() < firstLocalID {
				clashes = append(clashes, fmt.Errorf("users: %s is a system account of Debian\n  fix: use another name in cluster.yaml", u.Name))
				continue
			}
			mine[2], mine[3], mine[6] = id, id, shell
		} else {
			a.passwd.set(u.Name, "x", id, id, "", "/home/"+u.Name, shell)
		}
		if a.shadow.find(u.Name) == nil {
			a.shadow.set(u.Name, "*", "", "0", "99999", "7", "", "", "")
		}
		if group := a.group.find(u.Name); group != nil {
			group[2] = id
		} else {
			a.group.set(u.Name, "x", id, "")
		}
		if a.gshadow.find(u.Name) == nil {
			a.gshadow.set(u.Name, "!", "", "")
		}
	}
	return gone, errors.Join(clashes...)
}

// drop removes an account, its own group and its memberships.
func (a *accounts) drop(name string) {
	a.passwd.remove(name)
	a.shadow.remove(name)
	for _, t := range []*table{&a.group, &a.gshadow} {
		for _, l := range t.lines {
			if l.fields != nil && slices.Contains(members(l.fields[3]), name) {
				l.fields[3] = strings.Join(slices.DeleteFunc(members(l.fields[3]), func(m string) bool { return m == name }), ",")
			}
		}
	}
	if g := a.group.find(name); g != nil && len(members(g[3])) == 0 {
		a.group.remove(name)
		a.gshadow.remove(name)
	}
}

// accountFile is where a table lies, and who may read it when it is made anew.
type accountFile struct {
	name  string
	width int
	mode  fs.FileMode
	table *table
}

func (a *accounts) files() []accountFile {
	// group before passwd: an account must never show before its group.
	return []accountFile{
		{"etc/group", groupFields, 0o644, &a.group},
		{"etc/gshadow", gshadowFields, 0o640, &a.gshadow},
		{"etc/shadow", shadowFields, 0o640, &a.shadow},
		{"etc/passwd", passwdFields, 0o644, &a.passwd},
	}
}

func readAccounts(root meta.Root) (*accounts, error) {
	a := &accounts{}
	for _, f := range a.files() {
		text, err := root.ReadFile(f.name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		*f.table = parseTable(string(text), f.width)
	}
	return a, nil
}

func (a *accounts) write(root meta.Root) error {
	shadow := 0
	if g := a.group.find("shadow"); g != nil {
		shadow = max(0, line{fields: g}.id())
	}
	for _, f := range a.files() {
		gid := 0
		if f.mode == 0o640 {
			gid = shadow
		}
		if err := replaceFile(root, f.name, []byte(f.table.String()), f.mode, 0, gid); err != nil {
			return err
		}
	}
	return nil
}
