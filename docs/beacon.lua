-- Wireshark dissector for the frames by which the nodes of a cluster know of each
-- other: EtherType 0x88b5, magic "CC", version 2. protocol.md says what they mean;
-- the layout is that of netcore/membership/frame.go, with offsets from the
-- beginning of the Ethernet frame. It checks no HMAC: it has no key.
--
--     wireshark -X lua_script:docs/beacon.lua demo.pcapng

local cc = Proto("clonecluster", "Clone Cluster")

local states = {[1] = "listening", [2] = "serving", [3] = "draining", [4] = "stopping", [5] = "leaving", [6] = "restarting"}
local kinds = {[1] = "beacon", [2] = "part of a map", [3] = "card", [5] = "settings"}
local balances = {[0] = "as configured", [1] = "even", [2] = "load"}

local VERSION, BEACON, MAP, CARD, SETTINGS = 2, 1, 2, 3, 5
local ETHERNET = 14 -- the bytes before those that the dissector is given
local TAGS, PIECE, ADDRESSES, WEIGHTS = 223, 58, 47, 59
local MAP_HEAD, BUCKETS, NOBODY = 23, 1024, 255
local HMAC = 16

local f = {
	magic = ProtoField.string("clonecluster.magic", "Magic"),
	version = ProtoField.uint8("clonecluster.version", "Version"),
	kind = ProtoField.uint8("clonecluster.kind", "Kind", base.DEC, kinds),
	cluster = ProtoField.uint64("clonecluster.cluster", "Cluster (hash of its name)", base.HEX),
	incarnation = ProtoField.uint64("clonecluster.incarnation", "Incarnation", base.HEX),
	sequence = ProtoField.uint64("clonecluster.sequence", "Sequence"),
	hmac = ProtoField.bytes("clonecluster.hmac", "HMAC"),

	state = ProtoField.uint8("clonecluster.state", "State", base.DEC, states),
	flags = ProtoField.uint8("clonecluster.flags", "Flags", base.HEX),
	held_known = ProtoField.bool("clonecluster.flags.held_known", "Held buckets are known", 8, nil, 0x01),
	sick = ProtoField.bool("clonecluster.flags.sick", "A service fails its check", 8, nil, 0x02),
	weight = ProtoField.uint16("clonecluster.weight", "Weight"),
	busy = ProtoField.uint16("clonecluster.busy", "Busy (thousandths)"),
	flows = ProtoField.uint32("clonecluster.flows", "Connections"),
	rules = ProtoField.uint64("clonecluster.rules", "Fingerprint of the rules", base.HEX),
	map_version = ProtoField.uint64("clonecluster.map.version", "Version of the map"),
	map_leader = ProtoField.ether("clonecluster.map.leader", "Maker of the map"),
	parent_version = ProtoField.uint64("clonecluster.parent.version", "Version of its parent"),
	parent_leader = ProtoField.ether("clonecluster.parent.leader", "Maker of its parent"),
	lowest = ProtoField.ether("clonecluster.lowest", "Lowest node heard that takes part"),
	heard_count = ProtoField.uint8("clonecluster.heard.count", "Nodes heard"),
	heard = ProtoField.uint32("clonecluster.heard", "Tag", base.HEX),
	held = ProtoField.bytes("clonecluster.held", "Held buckets"),
	held_count = ProtoField.uint16("clonecluster.held.count", "Number of held buckets"),

	part = ProtoField.uint8("clonecluster.part", "Part"),
	parts = ProtoField.uint8("clonecluster.parts", "Parts"),
	piece = ProtoField.bytes("clonecluster.piece", "Piece of the map"),
	member_count = ProtoField.uint8("clonecluster.member.count", "Members"),
	member = ProtoField.ether("clonecluster.member", "Member"),
	member_buckets = ProtoField.uint16("clonecluster.member.buckets", "Buckets"),
	owners = ProtoField.bytes("clonecluster.owners", "Owner of each bucket"),
	port = ProtoField.uint16("clonecluster.port", "Port of the API"),
	address = ProtoField.ipv6("clonecluster.address", "Address"),
	name = ProtoField.string("clonecluster.name", "Host name"),
	build = ProtoField.string("clonecluster.build", "Program"),
	settings_version = ProtoField.uint64("clonecluster.settings.version", "Version of the settings"),
	settings_author = ProtoField.ether("clonecluster.settings.author", "Node that took the order"),
	settings_balance = ProtoField.uint8("clonecluster.settings.balance", "Balance", base.DEC, balances),
	settings_node = ProtoField.ether("clonecluster.settings.node", "Node"),
	settings_weight = ProtoField.uint16("clonecluster.settings.weight", "Weight"),
	settings_by = ProtoField.string("clonecluster.settings.by", "Order by", base.UNICODE),
	unowned = ProtoField.uint16("clonecluster.unowned", "Buckets of nobody"),
}
cc.fields = f

local e = {
	cut_off = ProtoExpert.new("clonecluster.cut_off", "The frame is cut off", expert.group.MALFORMED, expert.severity.WARN),
	malformed = ProtoExpert.new("clonecluster.malformed", "No node takes this frame", expert.group.MALFORMED, expert.severity.ERROR),
	other = ProtoExpert.new("clonecluster.other_version", "Another version of the protocol", expert.group.UNDECODED, expert.severity.NOTE),
}
cc.experts = e

-- Layouts: offset, length, field.
local head = {
	{14, 2, f.magic}, {16, 1, f.version}, {17, 1, f.kind}, {18, 8, f.cluster}, {26, 8, f.incarnation}, {34, 8, f.sequence},
}
local beacon_head = {
	{42, 1, f.state}, {43, 1, f.flags}, {43, 1, f.held_known}, {43, 1, f.sick}, {44, 2, f.weight}, {46, 2, f.busy}, {48, 4, f.flows},
	{52, 8, f.rules}, {60, 8, f.map_version}, {68, 6, f.map_leader}, {74, 8, f.parent_version}, {82, 6, f.parent_leader},
	{88, 6, f.lowest}, {94, 1, f.heard_count}, {95, 128, f.held},
}
local part_head = {{42, 8, f.map_version}, {50, 6, f.map_leader}, {56, 1, f.part}, {57, 1, f.parts}}
local map_head = {
	{PIECE, 8, f.parent_version}, {PIECE + 8, 6, f.parent_leader}, {PIECE + 14, 8, f.rules}, {PIECE + 22, 1, f.member_count},
}

-- bytes gives a part of the frame; nil if the frame does not have all of it.
local function bytes(tvb, offset, length)
	offset = offset - ETHERNET
	if length > 0 and offset + length <= tvb:len() then
		return tvb(offset, length)
	end
end

-- add adds the fields of a layout, and tells whether all of them are there.
local function add(tree, tvb, layout)
	for _, l in ipairs(layout) do
		local range = bytes(tvb, l[1], l[2])
		if not range then
			return false
		end
		tree:add(l[3], range)
	end
	return true
end

local function number(tvb, offset, length)
	local range = bytes(tvb, offset, length)
	return range and range:uint()
end

local function ones(range)
	local n, all = 0, range:bytes()
	for i = 0, all:len() - 1 do
		local byte = all:get_index(i)
		while byte > 0 do
			n = n + byte % 2
			byte = math.floor(byte / 2)
		end
	end
	return n
end

-- beacon gives what the frame is in a few words, where its HMAC begins, and
-- whether it is all there so far.
local function beacon(tvb, tree)
	local whole = add(tree, tvb, beacon_head)
	local held = bytes(tvb, 95, 128)
	if held then
		tree:add(f.held_count, held, ones(held)):set_generated()
	end
	local heard = number(tvb, 94, 1) or 0
	for i = 0, heard - 1 do
		whole = whole and add(tree, tvb, {{TAGS + 4 * i, 4, f.heard}})
	end
	local version = bytes(tvb, 60, 8)
	local info = string.format("Beacon, %s", states[number(tvb, 42, 1)] or "no state")
	if version then
		info = string.format("%s, map %s, hears %d", info, tostring(version:uint64()), heard)
	end
	return info, TAGS + 4 * heard, whole
end

-- members adds the members of a map that is whole in one part, and what each
-- owns. It tells whether the map is as it should be.
local function members(tvb, tree, n)
	local owners = bytes(tvb, PIECE + MAP_HEAD + 6 * n, BUCKETS)
	if not owners then
		return false
	end
	local count, owner = {[NOBODY] = 0}, owners:bytes()
	for b = 0, BUCKETS - 1 do
		local i = owner:get_index(b)
		count[i] = (count[i] or 0) + 1
		if i >= n and i ~= NOBODY then
			return false
		end
	end
	for i = 0, n - 1 do
		local range = bytes(tvb, PIECE + MAP_HEAD + 6 * i, 6)
		local item = tree:add(f.member, range):append_text(string.format(", %d buckets", count[i] or 0))
		item:add(f.member_buckets, range, count[i] or 0):set_generated()
	end
	tree:add(f.owners, owners)
	tree:add(f.unowned, owners, count[NOBODY]):set_generated()
	return true
end

-- map_part is what beacon is, for the other kind. Where the last part ends only
-- its length tells, and so the end of the frame is taken for its HMAC.
local function map_part(tvb, tree)
	local whole = add(tree, tvb, part_head)
	local version = bytes(tvb, 42, 8)
	local part, parts = number(tvb, 56, 1), number(tvb, 57, 1)
	if not parts then
		return "Map", PIECE, false
	end
	local info = string.format("Map %s, part %d of %d", tostring(version:uint64()), part + 1, parts)
	local last = ETHERNET + tvb:reported_len() - HMAC
	local piece = bytes(tvb, PIECE, math.min(last, ETHERNET + tvb:len()) - PIECE)
	if not piece then
		return info, last, false
	end
	local content = tree:add(f.piece, piece)
	if part == 0 then
		whole = add(content, tvb, map_head)
		local n = number(tvb, PIECE + 22, 1) or 0
		if parts == 1 and whole and tvb:len() == tvb:reported_len() then
			if last ~= PIECE + MAP_HEAD + 6 * n + BUCKETS or not members(tvb, content, n) then
				tree:add_proto_expert_info(e.malformed)
			end
		end
	end
	if parts == 0 or part >= parts then
		tree:add_proto_expert_info(e.malformed)
	end
	return info, last, whole
end

-- card is the same for the third kind.
local function card(tvb, tree)
	local whole = add(tree, tvb, {{42, 2, f.port}})
	local n, name, build = number(tvb, 44, 1) or 0, number(tvb, 45, 1) or 0, number(tvb, 46, 1) or 0
	for i = 0, n - 1 do
		whole = whole and add(tree, tvb, {{ADDRESSES + 16 * i, 16, f.address}})
	end
	local texts = ADDRESSES + 16 * n
	for _, l in ipairs({{texts, name, f.name}, {texts + name, build, f.build}}) do
		if l[2] > 0 then
			whole = whole and add(tree, tvb, {l})
		end
	end
	if whole and (n == 0 or n > 8) then
		tree:add_proto_expert_info(e.malformed)
	end
	local said = bytes(tvb, texts, name)
	return "Card" .. (said and " of " .. said:string() or ""), texts + name + build, whole and number(tvb, 46, 1) ~= nil
end

-- settings is the same for the fourth kind.
local function settings(tvb, tree)
	local whole = add(tree, tvb, {{42, 8, f.settings_version}, {50, 6, f.settings_author}, {56, 1, f.settings_balance}})
	local version, n, text = bytes(tvb, 42, 8), number(tvb, 57, 1) or 0, number(tvb, 58, 1) or 0
	for i = 0, n - 1 do
		local at = WEIGHTS + 8 * i
		whole = whole and add(tree, tvb, {{at, 6, f.settings_node}, {at + 6, 2, f.settings_weight}})
	end
	local by = WEIGHTS + 8 * n
	local said = bytes(tvb, by, text)
	if said then
		tree:add(f.settings_by, said, said:string(ENC_UTF_8))
	end
	whole = whole and (said or text == 0)
	if n > 150 or text > 100 or (number(tvb, 56, 1) or 0) > 2 then
		tree:add_proto_expert_info(e.malformed)
	end
	return "Settings" .. (version and " " .. tostring(version:uint64()) or ""), by + text, whole and number(tvb, 58, 1) ~= nil
end

function cc.dissector(tvb, pinfo, tree)
	local magic = bytes(tvb, 14, 2)
	if not magic or magic:string() ~= "CC" then
		return 0 -- somebody else's experiment
	end
	pinfo.cols.protocol = "CLONECLUSTER"
	local top = tree:add(cc, tvb())
	local version, kind = number(tvb, 16, 1), number(tvb, 17, 1)
	if version and version ~= VERSION then
		add(top, tvb, {{14, 2, f.magic}, {16, 1, f.version}})
		top:add_proto_expert_info(e.other)
		pinfo.cols.info = string.format("Version %d of the protocol", version)
		return tvb:len()
	end
	local whole = add(top, tvb, head)
	local info, hmac = "No kind of frame", nil
	if kind == BEACON then
		info, hmac, whole = beacon(tvb, top)
	elseif kind == MAP then
		info, hmac, whole = map_part(tvb, top)
	elseif kind == CARD then
		info, hmac, whole = card(tvb, top)
	elseif kind == SETTINGS then
		info, hmac, whole = settings(tvb, top)
	elseif kind then
		top:add_proto_expert_info(e.malformed)
	end
	if hmac then
		whole = whole and add(top, tvb, {{hmac, HMAC, f.hmac}})
		if whole and hmac + HMAC ~= ETHERNET + tvb:reported_len() then
			top:add_proto_expert_info(e.malformed)
		end
	end
	if not whole then
		top:add_proto_expert_info(e.cut_off)
	end
	top:append_text(", " .. info)
	pinfo.cols.info = info
	return tvb:len()
end

DissectorTable.get("ethertype"):add(0x88b5, cc)
