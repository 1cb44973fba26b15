"""A compiled text: a loop of three turns around one of five."""

# ruff: noqa: E501  (a line of the compiled text is one)

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}

%inner_condition (i: (s32[], f32[8])) -> pred[] {
  %i = (s32[], f32[8]{0}) parameter(0)
  %turn = s32[] get-tuple-element(%i), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%turn, %five), direction=LT
}

%inner_body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %f = f32[8]{0} fusion(%b), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/a/mul" stack_frame_id=3}, backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], /*index=1*/f32[8]{0}) tuple(%b, %f)
}

%outer_condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %test = pred[] fusion(%c), kind=kLoop, calls=%test_of_condition
}

%test_of_condition (c: (s32[], f32[8])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%three, %three), direction=LT
}

%outer_body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%b), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(step)/while"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (s32[], f32[8]{0}) tuple(%x, %x)
  %while.2 = (s32[], f32[8]{0}) while(%start), condition=%outer_condition, body=%outer_body
  %last = f32[8]{0:T(128)} get-tuple-element(%while.2), index=1
  ROOT %out = f32[8]{0} copy(%last), backend_config={"estimated_cycles":"100"}
}
"""
